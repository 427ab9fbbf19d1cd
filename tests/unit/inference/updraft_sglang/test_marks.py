from dataclasses import asdict

import pytest

from updraft_sglang.marks import SEAL, is_sealed, read_sealed, sealed
from updraft_tap.http.terms import NOT_ASKED, Terms, marked

SHARED = "of the server"
TERMS = Terms(domain="sql")
FORGED = {"updraft": asdict(Terms(domain="of another"))}


def test_a_mark_takes_the_terms_and_leaves_the_other_parameters_alone() -> None:
    params = sealed({"thinking_budget": 5}, TERMS, SHARED)

    assert params is not None
    assert params["thinking_budget"] == 5
    assert (is_sealed(params, SHARED), read_sealed(params, SHARED)) == (True, TERMS)


@pytest.mark.attack(
    boundary="plugin",
    attack="a client that sends the plugin's own marks, to be captured as somebody else",
    outcome="without the seal they do not count",
)
@pytest.mark.parametrize(
    "params", [None, [], "x", {}, FORGED, {**FORGED, SEAL: "guessed"}, {**FORGED, SEAL: 7}, {SEAL: SHARED}]
)
def test_without_the_seal_a_sender_was_not_asked(params: object) -> None:
    assert (is_sealed(params, SHARED), read_sealed(params, SHARED)) == (False, NOT_ASKED)


def test_without_a_secret_no_mark_counts() -> None:
    assert not is_sealed({**FORGED, SEAL: ""}, "")


def test_what_a_client_puts_in_place_of_a_mark_is_replaced_or_taken_away() -> None:
    forged = {**FORGED, SEAL: "guessed"}

    assert read_sealed(sealed(forged, TERMS, SHARED), SHARED) == TERMS
    assert sealed(forged, None, SHARED) is None
    assert sealed({**forged, "a": 1}, None, SHARED) == {"a": 1}


def test_a_client_opts_out_by_a_parameter_too() -> None:
    assert not read_sealed(sealed({"updraft_capture": "off"}, TERMS, SHARED), SHARED).permitted


def test_the_mark_is_that_of_every_engine() -> None:
    assert sealed(None, TERMS, SHARED) == {**(marked(None, TERMS) or {}), SEAL: SHARED}
