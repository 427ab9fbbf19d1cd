"""The hooks in vLLM's HTTP process: the middleware, and the mark that each request carries to the scheduler.

A request leaves that process once for each of its choices, in a task of the HTTP request that it is of.
"""

import logging
from collections.abc import Mapping
from typing import Any

from updraft_tap.hooks import Binding, Guard, Hook
from updraft_tap.http import about, door
from updraft_tap.http.door import Door, Rules
from updraft_tap.http.keys import Keys
from updraft_tap.http.terms import marked
from updraft_tap.settings import DoorSettings
from updraft_vllm import configuration, names

log = logging.getLogger(__name__)


class HttpProcess:
    """The hook bodies. Each calls `original` once with its own arguments. Raises KeysError if the keys file is invalid."""

    def __init__(self, settings: DoorSettings, socket: str = "") -> None:
        keys = (
            Keys(settings.api_keys_file, max_at_once=settings.max_requests_per_key) if settings.api_keys_file else None
        )
        self._rules = Rules(keys=keys, tenant_header=settings.tenant_header.lower().encode())
        self._socket = socket
        self._server: dict[str, Any] | None = None
        self.found: Mapping[str, str] = {}
        """The hooks as they were found."""
        self._guard = Guard(failed=_failed, unhooked=lambda _, reason: log.error("Updraft: %s", reason))
        self.bindings = (
            Binding(target=names.CLIENT, hook=self.start_client, parameters=("self", "vllm_config")),
            Binding(target=names.MIDDLEWARE, hook=self.add_middleware, parameters=("args", "app")),
            *(Binding(target=name, hook=self.send, parameters=("self", "request")) for name in names.SENDS),
        )

    def add_middleware(self, original: Hook, args: Any, app: Any, *more: Any, **kwargs: Any) -> None:
        """AROUND init_entrypoints_middleware; the last one that is added is the outermost. An error ends the server's start."""
        original(args, app, *more, **kwargs)
        app.add_middleware(Door, rules=self._rules, facts=self.facts)

    def start_client(self, original: Hook, client: Any, *args: Any, **kwargs: Any) -> None:
        """AROUND AsyncLLM.__init__, which gets the server's configuration."""
        self._guard("configuration", self._learn, kwargs.get("vllm_config") or next(iter(args), None))
        original(client, *args, **kwargs)

    def facts(self) -> dict[str, Any]:
        """See `updraft_tap.http.about`."""
        return about.facts(
            engine=names.ENGINE,
            version=configuration.version(),
            socket=self._socket,
            keys=self._rules.keys is not None,
            hooks=self.found,
            server=self._server,
        )

    def _learn(self, config: Any) -> None:
        self._server = configuration.facts(config)

    def send(self, original: Hook, client: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        """AROUND add_request_async of the clients of an engine. A request that gets no mark is not captured."""
        self._guard("terms", self._mark, request)
        return original(client, request, *args, **kwargs)

    def _mark(self, request: Any) -> None:
        params = request.sampling_params
        if params is not None:  # else it is a request for an embedding
            params.extra_args = marked(params.extra_args, door.current())


def _failed(error: Exception) -> None:
    log.error(
        "Updraft failed in the HTTP process; no unmarked request is captured: %s: %s", type(error).__name__, error
    )
