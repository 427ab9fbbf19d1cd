"""Whether the next step of a server drafts, and what drafting is worth. On the thread that schedules steps.

Engines overlap the scheduling of a step with the one before, so the kind of a step is known for certain only when it has ended.
A step takes the time since the step before it ended. That is its own time only after a step of the same kind.
"""

import random
import time
from collections.abc import Callable, Mapping
from typing import Any

from updraft_tap.drafting.speedup import SpeedupMeter
from updraft_tap.hooks import Guard

UNTRAINED = "updraft_untrained"
"""The key in the config.json of a draft that nobody has trained."""

MEASURING = "speedup"
"""The name of what a guard runs to measure, so that errors in it do not end the switching."""

Tell = Callable[[Mapping[str, Any]], None]


class Drafting:
    """The switch of a server."""

    def __init__(
        self,
        *,
        is_untrained: bool,
        tell: Tell | None = None,
        clock: Callable[[], float] = time.perf_counter,
        rng: random.Random | None = None,
    ) -> None:
        """`is_untrained`: nobody has trained the draft that the server started with, which is version 0. `tell` sends a message
        about the speedup; None: nothing is measured, and every trained draft is used."""
        self._is_untrained = is_untrained
        self._tell = tell
        self._clock = clock
        self._meter = SpeedupMeter(rng or random.Random())
        self._version = 0
        self._is_told = False
        self._ended_s = 0.0
        """When the step before ended."""
        self._was_drafted: bool | None = None
        """Its kind: with drafts or without; None if it was neither."""

    @property
    def is_useless(self) -> bool:
        """The draft knows nothing, so that it need not even keep up with the text."""
        return self._is_untrained and self._version == 0

    def forget(self) -> None:
        """Another agent is there, and knows nothing yet. The only function that another thread calls, the channel's."""
        self._is_told = False

    def serve(self, version: int) -> None:
        """This draft is in place from now on. The first one that is trained is used only after slices have shown that it is
        faster; others are used where the one before was."""
        if version != self._version:
            was_useless, self._version = self.is_useless, version
            self._meter.serve(version, is_on=False if was_useless else None)
            self._was_drafted, self._is_told = None, False

    def allows(self, batch_size: int) -> bool:
        """Whether the next step, of so many requests, may draft."""
        return not self.is_useless and (self._tell is None or self._meter.allows_drafts(batch_size))

    def pause(self) -> None:
        """The engine pauses, so the time until the next step ends is not that of a step."""
        self._was_drafted = None

    def stepped(self, batch_size: int, tokens: int, *, is_drafted: bool | None) -> None:
        """A step ended, and gave so many tokens to its requests. `is_drafted`: it verified drafts and proposed others, or did
        neither; None: it did only one of both, or read a prompt."""
        before_s, self._ended_s = self._ended_s, self._clock()
        was_drafted, self._was_drafted = self._was_drafted, is_drafted
        if self._tell is None or self.is_useless:
            return
        if is_drafted is not None and is_drafted is was_drafted:
            seconds = self._ended_s - before_s
            is_news = self._meter.observe(batch_size, tokens, seconds, is_drafted=is_drafted)
        else:
            is_news = self._meter.skip(batch_size)
        if is_news or not self._is_told:
            self._is_told = True
            self._tell(self._message())

    def _message(self) -> dict[str, Any]:
        """See `updraft_tap.wire`."""
        known = self._meter.speedups.items()
        loads = [[batch_size, one.ratio, one.low, one.high] for batch_size, one in known]
        return {"kind": "speedup", "version": self._version, "loads": loads}


def may_draft(drafting: Drafting, guard: Guard, batch_size: int) -> bool:
    """Whether the next step may draft. Every trained draft may if that cannot be found out."""
    allowed = None if MEASURING in guard.unhooked else guard("allows", drafting.allows, batch_size)
    return not drafting.is_useless if allowed is None else bool(allowed)
