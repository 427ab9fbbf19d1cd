import pytest

from updraft_tap.finished import Counters, Finished, Payload
from updraft_tap.http.terms import Terms


def test_steps_are_summed_by_the_version_that_proposed_and_by_position() -> None:
    counters = Counters(clock=iter((0.0, 0.25, 0.5, 1.0, 1.5)).__next__)
    counters.proposed(["a", "b"], 3)
    counters.verified("a", proposed=3, accepted=2)
    counters.proposed(["a"], 4)
    counters.verified("a", proposed=2, accepted=0)
    counters.verified("a", proposed=3, accepted=3)

    assert counters.end("a") == [
        {
            "version": 3,
            "steps": 1,
            "proposed": 3,
            "accepted": [1, 1, 0],
            "proposed_by_position": [1, 1, 1],
            "us": 250_000,
        },
        {
            "version": 4,
            "steps": 2,
            "proposed": 5,
            "accepted": [1, 1, 1],
            "proposed_by_position": [2, 2, 1],
            "us": 1_500_000,
        },
    ]
    assert counters.end("b") == []
    assert len(counters) == 0


def test_a_proposal_of_an_unknown_draft_has_no_version() -> None:
    counters = Counters()
    counters.verified("a", proposed=1, accepted=1)

    expected = {"version": None, "steps": 1, "proposed": 1, "accepted": [1], "proposed_by_position": [1], "us": 0}
    assert counters.end("a") == [expected]


def test_a_time_without_steps_is_no_time_of_a_step_which_counts_as_the_mean_of_the_others() -> None:
    now = [0.0]
    counters = Counters(clock=lambda: now[0])

    def step(rids: list[str], took_s: float) -> None:
        now[0] += took_s
        for rid in rids:
            counters.verified(rid, proposed=1, accepted=1)
        counters.proposed(rids, 3)

    counters.proposed(["a", "b"], 3)
    step(["a", "b"], 0.25)
    step(["a"], 0.5)
    step(["a", "b"], 0.75)  # for b it began two steps ago
    counters.pause()
    step(["a", "b"], 100.0)

    assert [counters.end(rid)[0]["us"] for rid in "ab"] == [2_000_000, 750_000]


def test_after_they_are_forgotten_requests_begin_anew() -> None:
    counters = Counters()
    counters.proposed(["a"], 3)
    counters.verified("a", proposed=1, accepted=1)
    counters.forget()
    counters.proposed(["a"], 4)
    counters.verified("a", proposed=1, accepted=0)

    assert [(one["version"], one["steps"]) for one in counters.end("a")] == [(4, 1)]


def test_a_request_that_was_never_seen_has_no_sums() -> None:
    assert Counters().end("a") == []


@pytest.mark.parametrize("accepted", [-1, 3])
def test_more_accepted_than_proposed_is_refused(accepted: int) -> None:
    with pytest.raises(ValueError, match="of 2 draft tokens"):
        Counters().verified("a", proposed=2, accepted=accepted)


def finished(payload: Payload | None) -> Finished:
    return Finished(
        rid="a-1",
        terms=Terms(domain="sql"),
        asked=True,
        finish="stopped",
        prompt_tokens=2,
        output_tokens=1,
        preemptions=0,
        duration_s=-0.5,
        constrained=False,
        counters=[],
        payload=payload,
    )


def test_only_a_captured_request_tells_its_tokens_and_how_they_were_sampled() -> None:
    payload = Payload(tokens=[1, 2, 7], sampling={"temperature": 0.5}, probability=0.25, num_cached=2)
    (captured, tensors), (counted, nothing) = (finished(one).message() for one in (payload, None))

    assert (tensors["tokens"].tolist(), nothing) == ([1, 2, 7], {})
    assert captured == counted | {"sampling": {"temperature": 0.5}, "probability": 0.25, "cached_tokens": 2}
    assert (counted["sampling"], counted["probability"], counted["cached_tokens"]) == (None, 0.0, 0)


def test_a_clock_that_was_set_back_gives_no_negative_duration() -> None:
    assert finished(None).message()[0]["duration_us"] == 0


def test_the_queue_counts_the_tokens_and_the_id_of_an_ended_request() -> None:
    payload = Payload(tokens=[1, 2, 7], sampling={}, probability=1.0)
    assert [finished(one).num_bytes for one in (None, payload)] == [3, 15]
