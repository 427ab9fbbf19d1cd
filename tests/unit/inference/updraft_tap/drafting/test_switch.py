"""A server drafts with a draft that is worth it, and says what it is worth."""

import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from updraft_tap.drafting.speedup import BLOCK, FIRST_BLOCK, MIN_BLOCKS
from updraft_tap.drafting.switch import Drafting

PLAIN_S = 0.03


class Engine:
    """Decodes one request for ever. A step verifies what the step before proposed, and takes the time of both."""

    def __init__(self, *, is_untrained: bool, measures: bool = True) -> None:
        self.told: list[Mapping[str, Any]] = []
        self.now_s = 0.0
        tell = self.told.append if measures else None
        clock: Callable[[], float] = lambda: self.now_s  # noqa: E731 - of this engine
        self.drafting = Drafting(is_untrained=is_untrained, tell=tell, clock=clock, rng=random.Random(1))
        self._has_drafts = False

    def run(self, steps: int, gain: float = 1.0, *, prompt_every: int = 0) -> list[bool]:
        """Whether each step was allowed to propose. Drafts decode `gain` times as fast as none."""
        allowed = []
        for number in range(steps):
            allows = self.drafting.allows(1)
            allowed.append(allows)
            tokens = 2 if self._has_drafts else 1
            proposing_s = PLAIN_S * (2 / gain - 1) if allows else 0.0
            self.now_s += PLAIN_S + proposing_s
            is_pure = allows is self._has_drafts
            reads = prompt_every and number % prompt_every == 0
            self.drafting.stepped(1, tokens, is_drafted=allows if is_pure and not reads else None)
            self._has_drafts = allows
        return allowed


def test_nothing_is_drafted_until_a_trained_draft_is_in_place() -> None:
    engine = Engine(is_untrained=True, measures=False)
    said = []
    for version in (0, 1, 2, 0):
        engine.drafting.serve(version)
        said.append((set(engine.run(40)), engine.drafting.is_useless))

    assert said == [({False}, True), ({True}, False), ({True}, False), ({False}, True)]


def test_a_server_that_starts_with_a_trained_draft_drafts_from_its_first_step() -> None:
    assert set(Engine(is_untrained=False, measures=False).run(40)) == {True}
    assert Engine(is_untrained=False).run(FIRST_BLOCK).count(True) > FIRST_BLOCK / 2


@pytest.mark.parametrize(("gain", "is_used"), [(0.8, False), (1.6, True)])
def test_the_first_version_is_used_once_slices_show_that_it_pays(gain: float, is_used: bool) -> None:  # noqa: FBT001
    engine = Engine(is_untrained=True)
    engine.run(50)
    engine.drafting.serve(1)
    assert engine.run(FIRST_BLOCK * MIN_BLOCKS, gain).count(True) < FIRST_BLOCK * MIN_BLOCKS / 3
    later = engine.run(20 * BLOCK, gain)

    assert (later.count(True) > 0.8 * len(later)) is is_used
    *_, last = engine.told
    assert (last["kind"], last["version"]) == ("speedup", 1)
    assert [batch_size for batch_size, *_ in last["loads"]] == [0, 1]
    for _, ratio, low, high in last["loads"]:
        assert ratio == pytest.approx(gain, rel=0.01), "only steps of one kind are compared"
        assert low <= ratio <= high


def test_a_draft_that_no_longer_pays_is_turned_off_and_the_next_one_has_to_show_its_worth() -> None:
    engine = Engine(is_untrained=False)
    engine.run(20 * BLOCK, 1.5)
    later = engine.run(60 * BLOCK, 0.7)[-10 * BLOCK :]
    assert later.count(True) < 0.1 * len(later)
    engine.drafting.serve(2)
    assert engine.run(FIRST_BLOCK * MIN_BLOCKS, 1.5).count(True) < FIRST_BLOCK * MIN_BLOCKS / 3
    assert engine.run(BLOCK, 1.5).count(True) > BLOCK / 2


def test_steps_that_read_prompts_say_nothing_and_no_slice_lasts_for_ever() -> None:
    engine = Engine(is_untrained=False)
    allowed = engine.run(10 * BLOCK, 1.5, prompt_every=2)

    assert engine.told[-1]["loads"] == []
    assert allowed.count(False) < 0.3 * len(allowed)


def test_a_pause_is_not_the_time_of_a_step() -> None:
    engine = Engine(is_untrained=False)
    for _ in range(10 * BLOCK):
        engine.run(1, 1.5)
        if engine.now_s % 1 < PLAIN_S:
            engine.now_s += 100
            engine.drafting.pause()

    ((_, ratio, *_), *_) = engine.told[-1]["loads"]
    assert ratio == pytest.approx(1.5, rel=0.01)


def test_another_agent_is_told_with_the_next_step_and_a_swap_too() -> None:
    engine = Engine(is_untrained=False)
    engine.run(10 * BLOCK, 1.5)
    told = len(engine.told)
    engine.drafting.forget()
    engine.run(1)
    engine.drafting.serve(3)
    engine.run(1)

    again, swapped = engine.told[told:]
    assert again == engine.told[told - 1]
    assert swapped == {"kind": "speedup", "version": 3, "loads": []}
