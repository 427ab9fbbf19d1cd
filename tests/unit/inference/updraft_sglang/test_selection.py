from types import SimpleNamespace
from typing import Any

import pytest

from updraft_sglang.marks import sealed
from updraft_sglang.selection import Selection
from updraft_tap.http.terms import NOT_ASKED, Terms
from updraft_tap.policy import Policy

SHARED = "of the server"
EVERYTHING = Policy(payload=1.0, prompt_rows=2)


def received(terms: Terms | None = Terms(), **more: Any) -> Any:  # noqa: B008 - it is frozen
    """A request as SGLang's scheduler receives it."""
    params = SimpleNamespace(custom_params=sealed(None, terms, SHARED))
    return SimpleNamespace(
        **{
            "sampling_params": params,
            "mm_inputs": None,
            "input_embeds": None,
            "lora_id": None,
            "session_params": None,
            **more,
        }
    )


def batch(*rids: str) -> list[Any]:
    return [SimpleNamespace(rid=rid) for rid in rids]


@pytest.fixture
def selection() -> Selection:
    made = Selection(SHARED)
    made.policy = EVERYTHING
    return made


def test_the_captured_requests_of_a_batch_keep_their_places_and_have_ids_of_their_own(selection: Selection) -> None:
    selection.meet("a", received(Terms(permitted=False)))
    selection.meet("b", received())

    captured = selection.captured(batch("a", "b", "never met"))

    assert captured is not None
    assert (captured.batch_size, captured.places, captured.options[0].prompt_rows) == (3, (1,), 2)
    assert captured.rids[0].startswith("b-")


def test_an_id_that_a_client_uses_again_is_another_request(selection: Selection) -> None:
    selection.meet("a", received())
    first = selection.end("a")
    selection.meet("a", received())
    second = selection.end("a")

    assert first is not None
    assert second is not None
    assert first.id != second.id


@pytest.mark.parametrize(
    "more", [{"mm_inputs": "an image"}, {"input_embeds": [[0.5]]}, {"lora_id": "adapter"}, {"session_params": "turn"}]
)
def test_what_is_no_text_of_the_target_gives_no_rows(selection: Selection, more: dict[str, Any]) -> None:
    selection.meet("a", received(**more))
    assert selection.captured(batch("a")) is None


def test_a_request_whose_sender_was_not_asked_gives_no_rows(selection: Selection) -> None:
    selection.meet("a", received(None))

    met = selection.end("a")

    assert selection.captured(batch("a")) is None
    assert met is not None
    assert (met.asked, met.terms) == (False, NOT_ASKED)


def test_another_agent_gets_nothing_that_the_one_before_chose(selection: Selection) -> None:
    selection.meet("a", received())
    selection.forget()
    selection.meet("b", received())

    assert selection.captured(batch("a", "b")) is None

    selection.policy = EVERYTHING
    selection.meet("c", received())
    captured = selection.captured(batch("a", "b", "c"))
    assert captured is not None
    assert captured.places == (2,)


def test_once_all_captured_requests_ended_no_batch_is_looked_at(selection: Selection) -> None:
    for rid in ("a", "a", "b"):
        selection.meet(rid, received())
    for rid in ("a", "b", "b"):
        selection.end(rid)

    assert selection.captured(None) is None
    assert "a" not in selection
