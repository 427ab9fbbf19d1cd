"""What a sender says, whatever bytes its headers have."""

from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from updraft_chassis.tenants import hashes
from updraft_tap.http.terms import (
    MAX_DOMAIN_CHARS,
    NOT_ASKED,
    Terms,
    UnknownTermsError,
    api_key,
    marked,
    read_mark,
    read_terms,
    tenant_digest,
)

KEY = "sk-one-0123456789"


def test_a_request_without_headers_is_permitted_and_of_nobody() -> None:
    assert read_terms([]) == Terms()


def test_the_domain_and_the_key_are_read() -> None:
    headers = [(b"x-updraft-domain", b" sql "), (b"authorization", f"bearer  {KEY} ".encode())]
    assert (read_terms(headers), api_key(headers)) == (Terms(domain="sql"), KEY)


@pytest.mark.parametrize("value", ["", KEY, f"Basic {KEY}", "Bearer", "Bearer  "])
def test_what_is_no_bearer_key_is_none(value: str) -> None:
    assert api_key([(b"authorization", value.encode())]) == ""


@pytest.mark.parametrize("values", [["off"], ["OFF"], ["on, Off "], ["on", "off"], ["no-train, off"], ["no-retain"]])
def test_who_opts_out_is_out_however_it_is_written(values: list[str]) -> None:
    assert not read_terms([(b"x-updraft-capture", value.encode()) for value in values]).permitted


@pytest.mark.parametrize("value", ["of", "false", "off;", "off\x00", "ö" * 1_000_000])
def test_a_word_that_does_not_exist_is_refused_in_one_short_printable_line(value: str) -> None:
    with pytest.raises(UnknownTermsError, match="expected on, off, no-train or no-retain") as caught:
        read_terms([(b"x-updraft-capture", value.encode())])
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


@pytest.mark.attack(
    boundary="plugin",
    attack="a domain header with control characters or of any length",
    outcome="it becomes one short printable line",
)
@pytest.mark.parametrize(
    ("value", "domain"),
    [
        (b"a\x00b\nc\x1b[31m", "a?b?c?[31m"),
        ("größe".encode(), "größe"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"x" * 1_000_000, "x" * MAX_DOMAIN_CHARS),
        ("😀".encode() * 65, "😀" * MAX_DOMAIN_CHARS),
    ],
)
def test_a_domain_is_cut_to_a_short_printable_line(value: bytes, domain: str) -> None:
    assert read_terms([(b"x-updraft-domain", value)]).domain == domain


@given(st.lists(st.tuples(st.sampled_from([b"x-updraft-domain", b"authorization"]), st.binary())))
def test_no_bytes_of_a_header_are_an_error(headers: list[tuple[bytes, bytes]]) -> None:
    terms = read_terms(headers)
    assert terms.permitted
    assert terms.domain.isprintable()


@pytest.mark.parametrize("extra", [None, {}, {"session_id": "7"}])
def test_a_mark_is_read_back_and_leaves_other_arguments(extra: dict[str, Any] | None) -> None:
    terms = Terms(domain="sql")
    arguments = marked(extra, terms)
    assert read_mark(arguments) == terms
    assert arguments is not None
    assert {name: value for name, value in arguments.items() if name != "updraft"} == (extra or {})
    assert read_mark(marked(arguments, Terms(permitted=False))) == Terms(permitted=False), "marked twice"


@pytest.mark.parametrize("says", ["off", " OFF", "no-retain", "of", 0, ["on"], None])
def test_a_client_that_cannot_set_headers_opts_out_by_an_argument(says: Any) -> None:
    assert not read_mark(marked({"updraft_capture": says}, Terms())).permitted


def test_an_argument_does_not_undo_what_the_header_says() -> None:
    assert not read_mark(marked({"updraft_capture": "on"}, Terms(permitted=False))).permitted
    assert read_mark(marked({"updraft_capture": "on"}, Terms())).permitted


def test_no_train_permits_evaluation_and_on_opts_in_by_the_header_only() -> None:
    assert read_terms([(b"x-updraft-capture", b"no-train")]) == Terms(train=False)
    assert read_terms([(b"x-updraft-capture", b"on, no-train")]) == Terms(train=False, opted_in=True)
    assert read_mark(marked({"updraft_capture": "no-train"}, Terms())) == Terms(train=False)
    assert read_mark(marked({"updraft_capture": "on"}, Terms())) == Terms()


def test_a_header_names_the_tenant_only_where_it_is_configured() -> None:
    headers = [(b"x-team", b" acme "), (b"authorization", f"Bearer {KEY}".encode())]
    assert read_terms(headers, b"x-team").tenant == tenant_digest(b"acme") == hashes.digest("acme")
    assert read_terms(headers).tenant == ""
    assert read_terms([(b"x-team", b" ")], b"x-team").tenant == ""
    assert read_terms([(b"x-team", "voilà".encode())], b"x-team").tenant == hashes.digest("voilà")


@pytest.mark.attack(
    boundary="plugin",
    attack="a client's own header with a tenant beside the gateway's, or a name that nobody can type",
    outcome="the request is refused with status 400",
)
@pytest.mark.parametrize("values", [[b"acme", b"acme"], [b"", b"acme"], [b"x" * 257], [b"a\x00"], [b"\xff"]])
def test_a_tenant_that_is_not_named_once_in_printable_text_is_refused(values: list[bytes]) -> None:
    with pytest.raises(UnknownTermsError, match=r"one header with the tenant|printable characters"):
        read_terms([(b"x-team", value) for value in values], b"x-team")


@pytest.mark.parametrize("mark", [None, "on", 1, [], {}, {"permitted": True}, {**asdict(Terms()), "more": 1}])
def test_a_request_without_a_mark_is_not_permitted(mark: Any) -> None:
    assert read_mark({"updraft": mark}) == NOT_ASKED
    assert read_mark(None) == NOT_ASKED


def test_outside_of_requests_nobody_can_mark() -> None:
    forged = {"updraft": asdict(Terms(domain="forged")), "session_id": "7"}
    assert marked(forged, None) == {"session_id": "7"}
    assert marked({"updraft": 1}, None) is None
    assert read_mark(marked(forged, Terms(domain="sql"))).domain == "sql"
