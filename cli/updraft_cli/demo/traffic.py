"""Live traffic: a few streams, each of which sends its next request when the last one has ended."""

import asyncio
from collections.abc import Iterator
from itertools import cycle

from updraft_cli.demo.chat import ChatServer, Question
from updraft_cli.demo.plan import MAX_TOKENS
from updraft_cli.demo.recording import Recording
from updraft_cli.prompts import domain_prompts, num_prompts

_AFTER_FAILURE_S = 1.0
"""A server that is away gets one request per second, not a tight loop."""


class Traffic:
    """Sends requests of one domain after another; a domain that returns continues where it stopped."""

    def __init__(self, server: ChatServer, recording: Recording) -> None:
        self._server = server
        self._recording = recording
        self._prompts: dict[str, Iterator[tuple[int, str]]] = {}

    async def flow(self, domain: str, for_s: float) -> None:
        prompts = self._prompts.setdefault(domain, endless_prompts(domain, self._recording.plan.seed))
        start_s = self._recording.now_s
        async with asyncio.TaskGroup() as streams:
            for _ in range(self._recording.plan.streams):
                streams.create_task(self._stream(prompts, domain, until_s=start_s + for_s))
        self._recording.add_live_s(self._recording.now_s - start_s)

    async def _stream(self, prompts: Iterator[tuple[int, str]], domain: str, *, until_s: float) -> None:
        while (started_s := self._recording.now_s) < until_s:
            number, text = next(prompts)
            question = Question(prompt=number, text=text, max_tokens=MAX_TOKENS, options={"domain": domain})
            answer = await self._server.ask(question)
            self._recording.add_request(answer, started_s=started_s)
            if answer.error:
                await asyncio.sleep(_AFTER_FAILURE_S)


def endless_prompts(domain: str, seed: int) -> Iterator[tuple[int, str]]:
    """Yield all prompts of a domain that are not held out, numbered, and then start again."""
    return cycle(enumerate(domain_prompts(domain, num_prompts(domain), seed)))
