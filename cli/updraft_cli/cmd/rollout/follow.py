"""Follow a rollout until it is over, whatever becomes of the registry meanwhile.

The registry sends whole states, so nothing has to be remembered over a lost connection but which version is followed. Only
the first connection has to succeed: who is told of an address where nobody is, wants to know now.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Protocol

from updraft.registry.v1 import registry_pb2 as pb
from updraft_chassis.errors import Unavailable
from updraft_chassis.retry import Backoff
from updraft_cli.backends.registry import Target
from updraft_cli.backends.rollout import Outcome, Status, Subject, status, subject

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub


class Display(Protocol):
    """Where a rollout is shown."""

    def show(self, status: Status) -> None:
        """Take a new state."""

    def lost(self, reason: str) -> None:
        """Take that the registry is away; `show` says that it is back."""


async def follow(target: Target, display: Display, *, number: int = 0, is_endless: bool = False) -> Outcome:
    """Show every state until the version is decided on and all pods have it; return what became of it.

    `number` 0 takes the version that is tried, else the newest; endless, always that one, and only an error ends it.
    """
    async with aclosing(_states(target, _Followed(number=number, is_fixed=not is_endless))) as states:
        async for now in states:
            if isinstance(now, Unavailable):
                display.lost(str(now))
                continue
            display.show(now)
            if now.outcome is not Outcome.UNDER_WAY and not is_endless:
                return now.outcome
    raise AssertionError("a watch has no end of its own")


class _Followed:
    """The version that is followed, asked for again when it may have changed its phase."""

    def __init__(self, *, number: int, is_fixed: bool) -> None:
        self._number = number
        self._is_fixed = is_fixed
        self._subject: Subject | None = None
        self._seen: tuple[object, ...] | None = None

    async def subject(self, stub: "RegistryAsyncStub", state: pb.SpeculatorState) -> Subject | None:
        """Return it as it is in this state; None while there is none."""
        number = self._number or state.candidate or state.latest
        if self._is_fixed:
            self._number = number
        # While it is on trial the message counts seconds, and its phase is known.
        waits_for = "" if number == state.candidate else state.message
        seen = (number, state.stable, state.candidate, waits_for)
        if seen != self._seen:
            self._subject = await subject(stub, state.speculator, number)
            self._seen = seen
        return self._subject


async def _states(target: Target, followed: _Followed) -> AsyncGenerator[Status | Unavailable, None]:
    """Yield each state, and each outage after the first."""
    backoff, has_begun = Backoff(initial_s=0.5, cap_s=5.0), False
    while True:
        try:
            async with target.connected() as stub:
                call = stub.Watch(pb.WatchRequest(speculator=target.speculator))
                try:
                    async for response in call:
                        now = status(response.state, await followed.subject(stub, response.state))
                        has_begun = True
                        backoff.reset()
                        yield now
                finally:
                    call.cancel()
        except Unavailable:
            if not has_begun:
                raise
        yield Unavailable(f"the registry at {target.registry} is away")
        await asyncio.sleep(next(backoff))
