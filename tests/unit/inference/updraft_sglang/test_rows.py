import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.support.tap_channel import Collected

from updraft_sglang.rows import RowHooks
from updraft_sglang.selection import Selection
from updraft_tap.between_steps import BetweenSteps, NeverBetweenStepsError
from updraft_tap.policy import CapturedRequests, CaptureOptions, captured_requests
from updraft_tap.steps import VERSION_ATTRIBUTE
from updraft_tap.weights import ServedVersion

WIDTH, VOCAB, AUX = 3, 7, 2


class Chosen(Selection):
    """Requests say here themselves what is wanted of them."""

    def captured(self, requests: Any) -> CapturedRequests | None:
        return captured_requests([(one.rid, one.options) for one in requests or ()])


def batch_of(*options: CaptureOptions | None) -> Any:
    """What the hooks read of SGLang's batch."""
    requests = [
        SimpleNamespace(rid=f"r{i}", options=one, origin_input_ids=[1, 2, 3, 4], output_ids=[], extend_batch_idx=1)
        for i, one in enumerate(options)
    ]
    size = len(requests)
    return SimpleNamespace(
        reqs=requests, seq_lens=torch.full((size,), 4), prefix_lens=[1] * size, extend_lens=[3] * size
    )


def shown(rows: int, states: int) -> Any:
    return SimpleNamespace(
        next_token_logits=torch.randn(rows, VOCAB),
        hidden_states=torch.randn(states, AUX),
        hidden_states_token_indices=None,
    )


class Sglang:
    """A worker's forward, as the hooks go around it: a prefill, or a verification that accepts one draft."""

    def __init__(self, channel: Collected, served: ServedVersion | None = None) -> None:
        self.between = BetweenSteps()
        self.capture = RowHooks(
            channel=channel,  # type: ignore[arg-type]  # stands for it
            selection=Chosen(""),
            between=self.between,
            served=served or ServedVersion(),
            top_k=2,
        )
        self.calls = 0

    def decode(self, batch: Any, logits_output: Any = None) -> Any:
        size = len(batch.seq_lens)
        verify_input = SimpleNamespace(draft_token=torch.arange(size * WIDTH) % VOCAB)
        logits_output = logits_output or shown(size * WIDTH, size * WIDTH)

        def eagle_sample(_: Any, __: Any, output: Any, grammar_mask: Any = None) -> Any:
            assert grammar_mask == "mask"
            output.next_token_logits.fill_(0)
            return "predict", torch.full((size,), 2), "accept_index"

        def forward(worker: Any, its_batch: Any, on_publish: Any = None) -> Any:
            self.calls += 1
            assert (worker, on_publish) == ("worker", "publish")
            sampled = self.capture.verify(eagle_sample, verify_input, its_batch, logits_output, "mask")
            return SimpleNamespace(sampled=sampled)

        return self.capture.forward(forward, "worker", batch, on_publish="publish")

    def prefill(self, batch: Any) -> Any:
        size = len(batch.seq_lens)
        runner = SimpleNamespace(is_draft_worker=False)

        def forward(_: Any, __: Any) -> Any:
            self.calls += 1
            sampled = self.capture.prefill(lambda *_: "tokens", runner, shown(size, 3 * size), "forward batch")
            return SimpleNamespace(sampled=sampled)

        return self.capture.forward(forward, "worker", batch)


WISH = CaptureOptions(payload=True, prompt_rows=2, counterfactual_rows=1, probability=0.5)


def test_a_decode_step_becomes_one_message() -> None:
    channel = Collected()
    served = ServedVersion()
    served.version = 5

    result = Sglang(channel, served).decode(batch_of(None, WISH))

    assert (result.sampled[0], getattr(result, VERSION_ATTRIBUTE)) == ("predict", 5)
    ((header, tensors),) = [item.message() for item in channel.items]
    (request,) = header["requests"]
    assert (header["requests"][0]["version"], header["batch_size"], header["duration_us"] > 0) == (5, 2, True)
    assert (request["rid"], request["position"], request["accepted"], request["drafts"]) == ("r1", 4, 1, [4, 5])
    assert (request["rows"], request["counterfactual_rows"], len(tensors["aux"])) == (2, 1, 3)
    assert channel.errors == []


@pytest.mark.parametrize("step", [Sglang.decode, Sglang.prefill])
def test_a_message_that_waits_does_not_keep_sglangs_batch_in_memory(step: Callable[[Sglang, Any], Any]) -> None:
    class Batch(SimpleNamespace):
        """Other than its base, it can be referred to weakly."""

    channel, batch = Collected(), Batch(**vars(batch_of(WISH)))
    reference = weakref.ref(batch)
    step(Sglang(channel), batch)

    del batch

    assert len(channel.items) == 1
    assert reference() is None


def test_the_logits_are_seen_before_sampling_changes_them() -> None:
    channel, logits = Collected(), shown(WIDTH, WIDTH)
    expected = logits.next_token_logits.logsumexp(-1)

    Sglang(channel).decode(batch_of(WISH), logits)

    assert torch.allclose(channel.items[0].message()[1]["log_sum_exp"], expected)


def test_a_prefill_becomes_one_message() -> None:
    channel = Collected()

    assert Sglang(channel).prefill(batch_of(WISH, None)).sampled == "tokens"

    ((header, tensors),) = [item.message() for item in channel.items]
    assert header["requests"] == [
        {"rid": "r0", "probability": 0.5, "position": 2, "cached": 1, "rows": 2, "teacher_rows": 1}
    ]
    assert (len(tensors["aux"]), len(tensors["ids"])) == (2, 1)


def test_a_light_wish_has_no_prefill_and_no_rows() -> None:
    channel = Collected()
    sglang = Sglang(channel)

    sglang.prefill(batch_of(CaptureOptions()))
    sglang.decode(batch_of(CaptureOptions()))

    ((header, tensors),) = [item.message() for item in channel.items]
    assert (header["requests"][0]["rows"], tensors) == (0, {})


@pytest.mark.parametrize("is_open", [True, False])
def test_without_a_wish_or_a_reader_nothing_is_done(is_open: bool) -> None:  # noqa: FBT001  (pytest's)
    channel = Collected(is_open=is_open)
    sglang = Sglang(channel)

    for batch in (batch_of(None, None),) if is_open else (batch_of(WISH),):
        sglang.decode(batch)
        sglang.prefill(batch)

    assert (sglang.calls, channel.items, channel.errors) == (2, [], [])


@pytest.mark.parametrize("broken", ["seq_lens", "reqs"])
def test_an_error_of_ours_is_counted_and_sglang_goes_on(broken: str) -> None:
    channel = Collected()
    batch = batch_of(WISH)
    setattr(batch, broken, torch.zeros(1) if broken == "seq_lens" else [object()])
    if broken == "seq_lens":
        batch.reqs *= 2

    assert Sglang(channel).decode(batch).sampled[0] == "predict"
    assert (len(channel.errors), channel.items) == (1, [])


def test_a_hook_that_raises_three_times_ends_capture_and_sglang_goes_on() -> None:
    channel = Collected()
    sglang = Sglang(channel)
    for _ in range(4):
        batch = batch_of(WISH)
        batch.extend_lens = [9]
        assert sglang.prefill(batch).sampled == "tokens"

    (problem,) = channel.ends
    assert problem.startswith("the hook rows raised 3 times and is unhooked, the last: ValueError: ")
    assert (len(channel.errors), channel.items, sglang.calls) == (3, [], 4)


def test_a_batch_without_requests_is_of_no_interest() -> None:
    channel, batch = Collected(), batch_of(None)
    batch.reqs = None

    assert Sglang(channel).decode(batch).sampled[0] == "predict"
    assert (channel.items, channel.errors) == ([], [])


def test_a_prefill_that_cannot_be_read_is_counted_and_sampled() -> None:
    channel = Collected()
    batch = batch_of(WISH)
    batch.extend_lens = [9]

    assert Sglang(channel).prefill(batch).sampled == "tokens"
    assert (len(channel.errors), channel.items) == (1, [])


def test_an_error_of_sglang_passes_and_leaves_nothing_behind() -> None:
    channel = Collected()
    sglang = Sglang(channel)

    def failing(*_: Any) -> Any:
        raise MemoryError("no page is left")

    with pytest.raises(MemoryError):
        sglang.capture.forward(failing, "worker", batch_of(WISH))
    sample: Callable[..., Any] = lambda *_: "tokens"  # noqa: E731  (SGLang's own)
    assert sglang.capture.prefill(sample, SimpleNamespace(is_draft_worker=False), shown(1, 3)) == "tokens"
    assert (channel.items, channel.errors) == ([], [])
    assert sglang.between.run(lambda: None, timeout_s=0.0) >= 0, "no forward is in progress any more"


def test_a_draft_is_not_swapped_within_a_forward() -> None:
    sglang = Sglang(Collected())

    def forward(_: Any, __: Any) -> Any:
        with pytest.raises(NeverBetweenStepsError):
            sglang.between.run(lambda: None, timeout_s=0.0)
        return SimpleNamespace()

    sglang.capture.forward(forward, "worker", batch_of(None))


def test_the_drafts_own_sampling_is_not_looked_at() -> None:
    channel = Collected()
    capture = Sglang(channel).capture

    def forward(_: Any, __: Any) -> Any:
        sampled = capture.prefill(lambda *_: "tokens", SimpleNamespace(is_draft_worker=True), shown(1, 3))
        return SimpleNamespace(sampled=sampled)

    assert capture.forward(forward, "worker", batch_of(WISH)).sampled == "tokens"
    assert channel.items == []
