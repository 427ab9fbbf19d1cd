"""The hooks in SGLang's HTTP processes: the middleware, and the mark that each request carries to the scheduler.

A request leaves such a process once for each of its choices, in a task of its HTTP request. With API keys, the requests that
the server sends to itself during startup carry a secret instead of a key.
"""

import logging
import os
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from updraft_sglang import names
from updraft_sglang.marks import sealed
from updraft_tap import hooks
from updraft_tap.hooks import Binding, Guard, Hook
from updraft_tap.http import about, door
from updraft_tap.http.door import OWN, Door, Rules
from updraft_tap.http.keys import Keys
from updraft_tap.settings import DoorSettings

log = logging.getLogger(__name__)

_OF_KEYS = (names.ARGUMENTS, names.CONFIGURATION)
"""The functions whose hooks protect keys; capture does not need them."""

_KEYS = ("admin_api_key", "api_key")
"""The secrets in SGLang's configuration."""

_HIDDEN = "***"

_is_own: ContextVar[bool] = ContextVar("updraft_own", default=False)
"""Whether this thread sends the server's requests to itself."""


class HttpProcess:
    """The hook bodies. Each calls `original` once with its own arguments. Raises KeysError if the keys file is invalid."""

    def __init__(self, settings: DoorSettings, secret: str, *, version: str = "", socket: str = "") -> None:
        """`version` of SGLang and `socket` of the agent are only reported."""
        self._version, self._socket = version, socket
        self.found: Mapping[str, str] = {}
        """Hooks, and why they are not in place; "" if they are."""
        self.needs_keys = settings.api_keys_file is not None
        keys = (
            Keys(settings.api_keys_file, max_at_once=settings.max_requests_per_key) if settings.api_keys_file else None
        )
        self._rules = Rules(
            keys=keys,
            tenant_header=settings.tenant_header.lower().encode(),
            own=secret,
            admin=lambda: self._admin_key,
        )
        self._admin_key = ""
        self._secret = secret
        self._guard = Guard(failed=_failed, unhooked=lambda _, reason: log.error("Updraft: %s", reason))
        self.bindings = (
            Binding(target=names.ARGUMENTS, hook=self.resolve, parameters=("self",)),
            Binding(target=names.CONFIGURATION, hook=self.show, parameters=("self",)),
            Binding(target=f"{names.MANAGER}.__init__", hook=self.start, parameters=("self",)),
            Binding(target=f"{names.MANAGER}._dispatch_to_scheduler", hook=self.send, parameters=("self", "obj")),
        )

    def resolve(self, original: Hook, arguments: Any, *args: Any, **kwargs: Any) -> Any:
        """AROUND ServerArgs.resolve_once. Raises SystemExit if clients could pass without a key."""
        done = original(arguments, *args, **kwargs)
        try:
            _hide_keys(arguments)
        except Exception as error:  # noqa: BLE001 - the server starts all the same
            log.error("Updraft cannot hide SGLang's keys in what /server_info shows: %s", type(error).__name__)
        if self.needs_keys:
            refuse(_bypass(arguments))
        return done

    def show(self, original: Hook, arguments: Any, *args: Any, **kwargs: Any) -> Any:
        """AROUND ServerArgs.resolved_dict. Whoever knows the admin key can pause the server and change its weights."""
        shown = original(arguments, *args, **kwargs)
        return {**shown, **{name: _HIDDEN for name in _KEYS if shown.get(name)}}

    def start(self, original: Hook, manager: Any, *args: Any, **kwargs: Any) -> Any:
        """AROUND TokenizerManager.__init__, before the process serves. Raises SystemExit if it could not require keys."""
        done = original(manager, *args, **kwargs)
        self._admin_key = str(getattr(getattr(manager, "server_args", None), "admin_api_key", None) or "")
        try:
            self.add_door(sys.modules[names.HTTP].app)
        except (KeyError, AttributeError, RuntimeError) as error:
            log.error("Updraft captures no requests, because it cannot add its middleware: %r", error)
            if self.needs_keys:
                refuse(f"this process has no HTTP application to which a middleware can be added: {error!r}")
        return done

    def add_door(self, app: Any) -> None:
        """Add the middleware unless it is there. The last middleware added is the outermost.

        Raises RuntimeError if it is too late, and SystemExit if the server could not start with it.
        """
        if any(one.cls is Door for one in app.user_middleware):
            return
        app.add_middleware(Door, rules=self._rules, facts=self.facts)
        if self.needs_keys:
            refuse(misfit(hooks.install(_of_own_requests(self._secret))))

    def facts(self) -> dict[str, Any]:
        """See `updraft_tap.http.about`. SGLang shows its configuration by itself."""
        return about.facts(
            engine=names.ENGINE,
            version=self._version,
            socket=self._socket,
            keys=self.needs_keys,
            hooks=self.found,
            server=None,
        )

    def send(self, original: Hook, manager: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """AROUND TokenizerManager._dispatch_to_scheduler. A request without a mark is not captured."""
        self._guard("terms", self._mark, obj)
        return original(manager, obj, *args, **kwargs)

    def _mark(self, sent: Any) -> None:
        for one in getattr(sent, "batch", None) or (sent,):
            params = getattr(one, "sampling_params", None)
            if params is None:  # it asks for no text
                continue
            if isinstance(params.custom_params, Mapping | None):  # clients may send anything
                params.custom_params = sealed(params.custom_params, door.current(), self._secret)


def misfit(found: Mapping[str, str]) -> str:
    """Why hooks are not in place, in one sentence; "" if all are."""
    return "; ".join(filter(None, found.values()))


def unasked(found: Mapping[str, str]) -> str:
    """Why no request can be asked whether it may be captured; "" if all are."""
    problem = _rust() or misfit({name: why for name, why in found.items() if name not in _OF_KEYS})
    return f"requests are counted but not captured: {problem}" if problem else ""


def refuse(problem: str) -> None:
    """Abort the start of the server if there is a problem. SGLang only logs other exceptions of a plugin."""
    if problem:
        raise SystemExit(f"Updraft: API keys cannot be enforced: {problem}")


def _of_own_requests(secret: str) -> tuple[Binding, ...]:
    """The hooks that let the server's warm-up requests to itself pass the middleware."""

    def warm_up(original: Hook, *args: Any, **kwargs: Any) -> Any:
        """AROUND _wait_and_warmup, which runs on its own thread."""
        _is_own.set(True)
        return original(*args, **kwargs)

    def request(original: Hook, *args: Any, **kwargs: Any) -> Any:
        """AROUND the function that sends them."""
        if _is_own.get():
            kwargs["headers"] = {**(kwargs.get("headers") or {}), OWN.decode(): secret}
        return original(*args, **kwargs)

    return (
        Binding(target=f"{names.HTTP}._wait_and_warmup", hook=warm_up, parameters=("server_args",)),
        Binding(target="requests.api.request", hook=request, parameters=("method", "url")),
    )


def _hide_keys(arguments: Any) -> None:
    """Hide the keys in the command line that the server shows."""
    command = shown = getattr(arguments, names.COMMAND, None) or ""
    keys = filter(None, (getattr(arguments, name, None) for name in _KEYS))
    for key in sorted(keys, key=len, reverse=True):  # one may begin with the other
        shown = shown.replace(key, _HIDDEN)
    if shown != command:
        setattr(arguments, names.COMMAND, shown)


def _bypass(arguments: Any) -> str:
    """Why clients would bypass the middleware; "" if they cannot."""
    from sglang.srt.arg_groups.overrides import resolving_view  # noqa: PLC0415  (only with keys)

    view = resolving_view(arguments)
    if view.smg_grpc_mode or view.grpc_mode or view.grpc_port is not None:
        return "SGLang's gRPC servers have no HTTP headers; leave out --grpc-port, --grpc-mode and --smg-grpc-mode"
    if view.disaggregation_mode != "null":
        return "the warm-up of a disaggregated pair sends requests without a key; leave out --disaggregation-mode"
    if view.encoder_only:
        return "the server of --encoder-only has its own HTTP application, without the middleware"
    return _rust()


def _rust() -> str:
    is_rust = os.environ.get(names.RUST, "").lower() in ("1", "true", "yes", "y")
    return f"with {names.RUST}, SGLang's HTTP server is not in Python; unset it" if is_rust else ""


def _failed(error: Exception) -> None:
    log.error("Updraft could not mark a request, so it is not captured: %s: %s", type(error).__name__, error)
