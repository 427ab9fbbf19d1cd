"""The pod's stream when the registry ends it, with a registry that follows a script."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest
from tests.support.wait import until

from updraft.fleet.v1 import fleet_pb2
from updraft_inference.agent.fleet import FleetLink, LinkState

EXPIRED = (("updraft-retry-after-s", "0"),)
OVERLOADED = (("updraft-retry-after-s", "1"),)
AWAY = ()


class Stream:
    """Answers the first report with a directive, but not without a nonce. Then it ends as UNAVAILABLE with these trailers.

    Without trailers, it stays.
    """

    def __init__(self, nonce: str, trailers: tuple[tuple[str, str], ...] | None) -> None:
        self._nonce = nonce
        self._trailers = trailers
        self._is_reported = asyncio.Event()

    async def write(self, _: fleet_pb2.ConnectRequest) -> None:
        self._is_reported.set()

    async def __aiter__(self) -> AsyncIterator[fleet_pb2.ConnectResponse]:
        await self._is_reported.wait()
        if self._nonce:
            yield fleet_pb2.ConnectResponse(directive=fleet_pb2.Directive(nonce=self._nonce))
        if self._trailers is None:
            await asyncio.Event().wait()
        trailers = grpc.aio.Metadata(*(self._trailers or ()))
        raise grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), trailers, "ended")

    def cancel(self) -> None:
        pass


class Registry:
    """Its streams end like this, one after the other; the last one stays."""

    def __init__(self, *ends: tuple[tuple[str, str], ...], answers: bool = True) -> None:
        """With `answers` False, only the last stream brings a directive."""
        ending = [Stream(str(number) if answers else "", end) for number, end in enumerate(ends)]
        self._streams = [*ending, Stream(str(len(ends)), None)]
        self.heard: list[str] = []
        """Nonces of the pod's directives, and its states without a connection, in order."""

    def Connect(self) -> Any:  # noqa: N802 - the service's name for it
        return self._streams.pop(0)

    async def talk(self) -> list[str]:
        """With a pod, until the last stream's directive is there."""

        def note(state: LinkState) -> None:
            if state is not LinkState.UP:
                self.heard.append(state)

        stub: Any = self
        link = FleetLink(
            stub,
            fleet_pb2.PodReport,
            lambda directive: self.heard.append(directive.nonce),
            changed=asyncio.Event(),
            on_link=note,
            report_s=60.0,
        )
        last = str(len(self._streams) - 1)
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(link.run())
            await until(lambda: last in self.heard, what="the last directive")
            task.cancel()
        return self.heard


async def test_a_stream_whose_token_has_expired_goes_on_in_another_one_and_is_never_away(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    assert await Registry(EXPIRED, EXPIRED, EXPIRED).talk() == ["0", "1", "2", "3"]
    assert not caplog.records


async def test_a_registry_that_only_ends_streams_is_away_and_is_called_after_a_pause() -> None:
    assert await Registry(EXPIRED, answers=False).talk() == [LinkState.AWAY, "1"]


@pytest.mark.parametrize(
    "trailers", [pytest.param(AWAY, id="without a word"), pytest.param(OVERLOADED, id="overloaded")]
)
async def test_a_stream_that_ends_for_another_reason_is_away_until_the_next_directive(
    trailers: tuple[tuple[str, str], ...],
) -> None:
    assert await Registry(trailers).talk() == ["0", LinkState.AWAY, "1"]
