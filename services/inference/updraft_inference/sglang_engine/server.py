"""HTTP client of a stock SGLang server: its native routes, with deadlines, and its errors as texts.

Nothing is retried here. Not used: its OpenAI routes, which neither accept nor return token ids, and its gRPC API, which
cannot update a draft alone.
"""

import asyncio
import base64
import json
import pickle
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Self

import httpx
from torch import Tensor

from updraft_chassis.errors import Conflict, Exhausted, Forbidden, InvalidInput, Unavailable, UpdraftError

_CONNECT_S = 5.0
_KEEP_S = 2.0
"""How long an idle connection is reused. The server closes it after 5 s, and a request sent at that moment is lost."""
_ASK_S = 20.0
"""For queries; the first one to a server that has just started is slow."""
_PAUSE_S = 20.0
_TAKEN_S = 3.0
"""How long a server that reports itself unhealthy may take to generate one token before it counts as paused."""
_UPDATE_S = 120.0
"""A session waits for running requests if someone ends our pause, and weights are read from disk."""
_CHECKSUM_S = 120.0

DRAFT = "draft"

Named = list[tuple[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    version: str
    model_path: str
    device: str
    dtype: str
    tp_size: int
    dp_size: int
    num_slots: int
    max_context: int
    """Maximum tokens per request, prompt and output together."""
    algorithm: str
    draft_path: str
    num_steps: int
    num_branches: int
    is_adaptive: bool
    weight_loaders: tuple[str, ...]

    @classmethod
    def of(cls, server_info: Mapping[str, Any], model: Mapping[str, Any]) -> "ServerInfo":
        """Parse /server_info and /model_info. Raises InvalidInput if a required field is missing."""
        try:
            steps = int(server_info["speculative_num_steps"] or 0)
            width = int(server_info["speculative_num_draft_tokens"] or 0)
            is_adaptive = bool(server_info.get("speculative_adaptive"))
            return cls(
                version=str(server_info["version"]),
                model_path=str(model["model_path"]),
                device=str(server_info["device"]).partition(":")[0],
                dtype=str(server_info["dtype"]),
                tp_size=int(server_info["tp_size"]),
                dp_size=int(server_info["dp_size"]),
                num_slots=int(server_info["max_running_requests"] or _slots(server_info)),
                max_context=_max_context(server_info, max(steps, width, _ADAPTIVE_WIDTH if is_adaptive else 0)),
                algorithm=str(server_info["speculative_algorithm"] or ""),
                draft_path=str(server_info["speculative_draft_model_path"] or ""),
                num_steps=steps,
                num_branches=int(server_info["speculative_eagle_topk"] or 0),
                is_adaptive=is_adaptive,
                weight_loaders=tuple(server_info.get("custom_weight_loader") or ()),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise InvalidInput(f"SGLang server info is missing required fields: {error!r}") from error


def _slots(server_info: Mapping[str, Any]) -> int:
    return int(server_info["internal_states"][0]["effective_max_running_requests_per_dp"])


def _max_context(server_info: Mapping[str, Any], reserved: int) -> int:
    """The server accepts prompts shorter than max_req_input_len, which is its context minus _KEPT, and reserves
    `reserved` tokens per request for drafts."""
    return int(server_info["max_req_input_len"]) - max(0, reserved - _KEPT)


_KEPT = 6

_ADAPTIVE_WIDTH = 8
"""Widest verify step of the default candidates of adaptive speculation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamEvent:
    """One event of a generation. `output_ids` are all ids so far or only the new ones, depending on the server."""

    output_ids: tuple[int, ...]
    meta: Mapping[str, Any]

    @property
    def finish(self) -> Mapping[str, Any] | None:
        finish: Mapping[str, Any] | None = self.meta.get("finish_reason")
        return finish

    @property
    def gives_tokens(self) -> bool:
        """Whether it reports new tokens. The end of an aborted request is sent without, also by a paused server."""
        return bool(self.output_ids) and (self.finish is None or self.finish.get("type") != "abort")

    def new_ids(self, num_known: int) -> tuple[int, ...]:
        """Tokens after the first `num_known`, whichever way the server streams."""
        total = int(self.meta.get("completion_tokens") or num_known)
        num_new = max(0, total - num_known)
        if num_new > len(self.output_ids):
            raise Unavailable(f"the SGLang server sent {len(self.output_ids)} of {num_new} new tokens")
        return self.output_ids[-num_new:] if num_new else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RankChecksums:
    """Checksums by tensor name of one process of the server, and its place in the tensor-parallel group."""

    tp_rank: int
    tp_size: int
    hashes: Mapping[str, str]


class SglangServer:
    """Use as an async context manager."""

    def __init__(self, url: str, *, admin_key: str = "") -> None:
        self.url = url.rstrip("/")
        self._num_given = 0
        """Events with new tokens so far."""
        self._headers = {"Authorization": f"Bearer {admin_key}"} if admin_key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=32, keepalive_expiry=_KEEP_S)
        self._http = httpx.AsyncClient(base_url=self.url, limits=limits, trust_env=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def info(self) -> ServerInfo:
        return ServerInfo.of(await self._get("/server_info"), await self._get("/model_info"))

    async def responds(self, timeout_s: float) -> bool:
        """Whether it answers, paused or not."""
        return await self._ping(timeout_s) is not None

    async def is_up(self, timeout_s: float) -> bool:
        """Whether it has loaded and serves, paused or not, and has failed no health check since."""
        return await self._ping(timeout_s) == HTTPStatus.OK

    async def _ping(self, timeout_s: float) -> int | None:
        """The status; None if it does not answer."""
        try:
            return (await self._send("GET", "/ping", timeout_s)).status_code
        except Unavailable:
            return None

    async def why_unhealthy(self) -> str:
        """Why weights cannot be changed now; empty if they can.

        A healthy server that is not ready is paused. A server that remembers a failed health check does not report
        whether it is paused, but a paused one generates no tokens.
        """
        if (await self._send("GET", "/ready")).status_code == HTTPStatus.OK:
            return ""
        if (await self._send("GET", "/ping")).status_code == HTTPStatus.OK:
            return "was paused by someone else"
        if await self.gives_tokens():
            return ""
        return f"is unhealthy and generated no token for {_TAKEN_S:g} s: it hangs, or was paused by someone else"

    async def gives_tokens(self) -> bool:
        """Whether a probe request, or any request through this client, gets a token soon."""
        num_given = self._num_given
        body = {"rid": f"updraft-{uuid.uuid4().hex}", "input_ids": [0], "sampling_params": {"max_new_tokens": 1}}
        try:
            async with asyncio.timeout(_TAKEN_S), self.generate(body) as events:
                async for _ in events:
                    pass
        except (TimeoutError, UpdraftError):  # a full queue proves nothing
            pass
        return self._num_given > num_given

    @asynccontextmanager
    async def generate(self, body: Mapping[str, Any]) -> AsyncIterator[AsyncIterator[StreamEvent]]:
        """Events of a new request, with no deadline between two because it may be queued for long.

        Raises InvalidInput, Exhausted or Unavailable in the block. Leaving it early disconnects, which aborts the
        request within seconds.
        """
        timeout = httpx.Timeout(_ASK_S, connect=_CONNECT_S, read=None)
        headers = self._headers
        try:
            async with self._http.stream(
                "POST", "/generate", json={**body, "stream": True}, headers=headers, timeout=timeout
            ) as answer:
                if answer.status_code != HTTPStatus.OK:
                    await answer.aread()
                    raise _refusal(answer.status_code, _message(answer.text))
                yield self._counted(_events(answer))
        except httpx.HTTPError as error:
            raise self._away(error) from error

    async def _counted(self, events: AsyncIterator[StreamEvent]) -> AsyncIterator[StreamEvent]:
        async for event in events:
            self._num_given += event.gives_tokens
            yield event

    async def abort(self, rid: str) -> None:
        """End a request. The server ignores ids that it does not know yet."""
        await self._admin("/abort_request", {"rid": rid}, _ASK_S)

    async def pause(self) -> None:
        """Stop between two steps; running requests keep their slot and cache."""
        await self._admin("/pause_generation", {"mode": "in_place"}, _PAUSE_S)

    async def resume(self) -> None:
        await self._admin("/continue_generation", {}, _PAUSE_S)

    async def begin_update(self) -> None:
        """Open an update session for the draft. Raises Conflict if one is open."""
        await self._admin("/begin_weight_update", {"selector": DRAFT}, _UPDATE_S)

    async def end_update(self) -> None:
        await self._admin("/end_weight_update", {}, _UPDATE_S)

    async def update(self, named: Named, *, load_format: str, label: str, tp_size: int) -> None:
        """Pass these tensors to the draft's loader `load_format` on each of `tp_size` ranks. Raises Conflict if it refuses."""
        packed = base64.b64encode(pickle.dumps(named)).decode()
        body = {
            "serialized_named_tensors": [packed] * tp_size,
            "load_format": load_format,
            "selector": DRAFT,
            "flush_cache": False,  # the target's cache stays valid; stale draft entries only cost acceptance
            "weight_version": label,
        }
        await self._admin("/update_weights_from_tensor", body, _UPDATE_S)

    async def checksums(self, selector: str = DRAFT) -> list[RankChecksums]:
        answer = await self._admin("/weights_checker", {"action": "checksum", "selector": selector}, _CHECKSUM_S)
        try:
            return [_rank(rank) for rank in answer["ranks"]]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise Unavailable(f"the SGLang server at {self.url} reports no checksums: {error!r}") from error

    async def _send(
        self, method: str, path: str, timeout_s: float = _ASK_S, body: Mapping[str, Any] | None = None
    ) -> httpx.Response:
        timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_S))
        try:
            return await self._http.request(method, path, json=body, headers=self._headers, timeout=timeout)
        except httpx.HTTPError as error:
            raise self._away(error) from error

    async def _get(self, path: str) -> dict[str, Any]:
        return self._object(path, await self._send("GET", path))

    async def _admin(self, path: str, body: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        answer = await self._send("POST", path, timeout_s, body)
        if not answer.content and answer.status_code == HTTPStatus.OK:
            return {}
        content = self._object(path, answer)
        if content.get("success") is False:
            raise Conflict(f"SGLang refuses {path}: {content.get('message')}")
        return content

    def _object(self, path: str, answer: httpx.Response) -> dict[str, Any]:
        if answer.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            raise Forbidden(
                f"the SGLang server at {self.url} refuses {path}: set UPDRAFT_INFERENCE_SGLANG_ADMIN_KEY to its admin key"
            )
        if answer.status_code == HTTPStatus.BAD_REQUEST:
            raise Conflict(f"SGLang refuses {path}: {_message(answer.text)}")
        try:
            content = answer.json()
        except ValueError:
            content = None
        if answer.status_code != HTTPStatus.OK or not isinstance(content, dict):
            raise Unavailable(f"the SGLang server at {self.url} answered {path} with status {answer.status_code}")
        return content

    def _away(self, error: httpx.HTTPError) -> Unavailable:
        return Unavailable(f"the SGLang server at {self.url} does not answer: {str(error) or type(error).__name__}")


async def _events(answer: httpx.Response) -> AsyncIterator[StreamEvent]:
    async for line in answer.aiter_lines():
        if not line.startswith("data: {"):
            continue
        try:
            yield _event(json.loads(line[len("data: ") :]))
        except (ValueError, TypeError, AttributeError) as error:
            raise Unavailable(f"the SGLang server sent an invalid event: {line[:100]!r}") from error


def _event(content: Mapping[str, Any]) -> StreamEvent:
    if "error" in content:
        error = content["error"]
        status = int(error.get("code") or 500) if isinstance(error, dict) else 500
        raise _refusal(status, error.get("message") if isinstance(error, dict) else error)
    event = StreamEvent(output_ids=tuple(content.get("output_ids") or ()), meta=content.get("meta_info") or {})
    finish = event.finish
    if finish is not None and finish.get("type") == "abort" and finish.get("status_code") is not None:
        raise _refusal(int(finish["status_code"]), finish.get("message"))
    return event


def _refusal(status: int, message: object) -> UpdraftError:
    text = f"SGLang refuses the request: {message}"
    if status == HTTPStatus.BAD_REQUEST:
        return InvalidInput(text)
    if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        return Exhausted(text)
    return Unavailable(text)


def _message(text: str) -> str:
    """The message in the body of an error, in any of its formats."""
    try:
        content = json.loads(text)
    except ValueError:
        return text[:500]
    if not isinstance(content, dict):
        return text[:500]
    error = content.get("error")
    message = error.get("message") if isinstance(error, dict) else error or content.get("message")
    return str(message or text[:500])


def _rank(content: Mapping[str, Any]) -> RankChecksums:
    place = content["parallelism_info"][0]
    return RankChecksums(
        tp_rank=int(place["tp_rank"]), tp_size=int(place["tp_size"]), hashes=dict(content["checksums"])
    )
