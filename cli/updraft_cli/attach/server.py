"""Queries a running server, at its own endpoints and at the plugin's."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import httpx

from updraft_chassis.errors import InvalidInput, Unavailable
from updraft_cli.attach.findings import Answers
from updraft_cli.attach.needs import EngineName

_ANSWER_S = 20.0
"""An SGLang server asks its scheduler, which may be busy."""

_PLUGIN = "/v1/updraft/plugin"
_SPECULATES = "vllm:spec_decode_num_drafts"
_REFUSALS = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN})


def ask(engine: EngineName, url: str, key: str) -> Answers:
    """Query the server. Raises Unavailable if nothing answers, InvalidInput for an invalid URL."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx.Client(base_url=url, timeout=_ANSWER_S, trust_env=False) as http:
            models = http.get("/v1/models", headers=headers)
            open_models = http.get("/v1/models") if key else models
            plugin = http.get(_PLUGIN, headers=headers)
            metrics = http.get("/metrics", headers=headers)
            info = _json(http.get("/server_info", headers=headers)) if engine == "sglang" else None
            release = info if engine == "sglang" else _json(http.get("/version", headers=headers))
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise InvalidInput(f"{url} is not a URL such as http://127.0.0.1:8000 ({error})") from error
    except httpx.HTTPError as error:
        raise Unavailable(f"no server answers at {url}: {error}") from error
    version = release.get("version") if release is not None else None
    return Answers(
        version=version if isinstance(version, str) else None,
        is_speculating=_SPECULATES in metrics.text,
        plugin=_json(plugin),
        info=info,
        is_refused=plugin.status_code in _REFUSALS,
        is_open=open_models.is_success,
    )


def _json(answer: httpx.Response) -> Mapping[str, Any] | None:
    """The object that was answered."""
    if not answer.is_success:
        return None
    try:
        content = answer.json()
    except ValueError:
        return None
    return content if isinstance(content, dict) else None
