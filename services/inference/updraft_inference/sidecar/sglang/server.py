"""HTTP client of a stock SGLang server: the routes that replace its draft, with deadlines, and its errors as texts.

Nothing is retried here. Not used: its gRPC API, which cannot update a draft alone.
"""

import base64
import json
import pickle
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
from torch import Tensor

from updraft_chassis.errors import Conflict, Forbidden, InvalidInput, Unavailable
from updraft_sglang.ranks.preparation import PREPARE, PREPARED

_HERE = ("127.0.0.1", "::1", "localhost")
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
_UNKNOWN_ACTION = "Unsupported action"
"""SGLang's words for an action that its plugins do not know."""

Named = list[tuple[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    version: str
    model_path: str
    device: str
    dtype: str
    tp_size: int
    dp_size: int
    pp_size: int
    num_nodes: int = 1
    algorithm: str
    draft_path: str
    num_branches: int
    weight_loaders: tuple[str, ...]

    @classmethod
    def of(cls, server_info: Mapping[str, Any], model: Mapping[str, Any]) -> "ServerInfo":
        """Parse /server_info and /model_info. Raises InvalidInput if a required field is missing."""
        try:
            return cls(
                version=str(server_info["version"]),
                model_path=str(model["model_path"]),
                device=str(server_info["device"]).partition(":")[0],
                dtype=str(server_info["dtype"]),
                tp_size=int(server_info["tp_size"]),
                dp_size=int(server_info["dp_size"]),
                pp_size=int(server_info["pp_size"]),
                num_nodes=int(server_info.get("nnodes") or 1),
                algorithm=str(server_info["speculative_algorithm"] or ""),
                draft_path=str(server_info["speculative_draft_model_path"] or ""),
                num_branches=int(server_info["speculative_eagle_topk"] or 0),
                weight_loaders=tuple(server_info.get("custom_weight_loader") or ()),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise InvalidInput(f"SGLang server info is missing required fields: {error!r}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class RankChecksums:
    """Checksums by tensor name of one process of the server, and its place in the tensor-parallel group."""

    tp_rank: int
    tp_size: int
    hashes: Mapping[str, str]


class SglangServer:
    """Use as an async context manager. `is_own` is a server that Updraft itself started, under whatever address."""

    def __init__(self, url: str, *, admin_key: str = "", is_own: bool = False) -> None:
        self.url = url.rstrip("/")
        headers = {"X-Updraft-Capture": "off", **({"Authorization": f"Bearer {admin_key}"} if admin_key else {})}
        limits = httpx.Limits(keepalive_expiry=_KEEP_S)
        # The certificate is for clients: it may name other hosts, and come from a CA that is not known here.
        is_here = is_own or urlsplit(self.url).hostname in _HERE
        self._http = httpx.AsyncClient(
            base_url=self.url, headers=headers, limits=limits, trust_env=False, verify=not is_here
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def info(self) -> ServerInfo:
        return ServerInfo.of(await self._get("/server_info"), await self._get("/model_info"))

    async def is_up(self, timeout_s: float) -> bool:
        """Whether it has loaded and serves, paused or not, and has failed no health check since."""
        try:
            return (await self._send("GET", "/ping", timeout_s)).status_code == HTTPStatus.OK
        except Unavailable:
            return False

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
        """Whether a request of our own gets a token soon."""
        rid = f"updraft-{uuid.uuid4().hex}"
        body = {"rid": rid, "input_ids": [0], "sampling_params": {"max_new_tokens": 1}}
        try:
            return (await self._send("POST", "/generate", _TAKEN_S, body)).status_code == HTTPStatus.OK
        except Unavailable:  # the connection is closed, which aborts the request
            return False

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

    async def prepare(self, order: str) -> str:
        """Let all ranks prepare a draft (the JSON of an `Order`) beside their steps. Returns who is not ready; "" if all are.

        Raises Conflict if a rank refuses.
        """
        body = {"action": PREPARE + order, "selector": DRAFT}
        try:
            message = str((await self._admin("/weights_checker", body, _CHECKSUM_S)).get("message"))
        except Conflict as error:
            if _UNKNOWN_ACTION in str(error):
                raise Conflict(
                    f"the server's plugin is of another release; prepare and start it with this one ({error})"
                ) from error
            raise
        return "" if message == PREPARED else message

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
            return await self._http.request(method, path, json=body, timeout=timeout)
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
