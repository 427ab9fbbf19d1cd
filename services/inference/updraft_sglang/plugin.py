"""The entry point that SGLang calls in each of its processes: installs hooks, and connects the scheduler to the agent.

Without UPDRAFT_SGLANG_SOCKET and UPDRAFT_SGLANG_API_KEYS_FILE, nothing is hooked. SGLang is not patched on disk. One process
has the requests and the model of a rank, so it has both roles, with one connection to the agent for each: `scheduler`
(counters, ends of requests) and `worker` (rows, swaps). All tensor-parallel ranks do the same, so only the first one connects.
"""

import logging
import os
import secrets
import uuid
from collections.abc import Mapping
from functools import cache
from typing import Any

from updraft_sglang import configuration, names
from updraft_sglang.http_process import HttpProcess, misfit, refuse
from updraft_sglang.roles import SchedulerRole, WorkerRole
from updraft_sglang.selection import Selection
from updraft_sglang.weights import share_vocabulary
from updraft_tap import hooks
from updraft_tap.hooks import Binding, Hook
from updraft_tap.ports import certificates, rendezvous
from updraft_tap.settings import DoorSettings, Settings

log = logging.getLogger(__name__)

PREFIX = "UPDRAFT_SGLANG_"

_KEYS = f"{PREFIX}API_KEYS_FILE"
_SERVER = f"{PREFIX}SERVER"
"""The variable with which processes of the same server recognise each other."""
_SECRET = f"{PREFIX}SECRET"
"""The variable with which they share the seal of their marks."""
APP = f"{PREFIX}HTTP_APP"
"""The variable that names SGLang's own application, for several HTTP processes."""
_APP_OF_SGLANG = f"{names.HTTP}:app"
_APP_OF_OURS = "updraft_sglang.worker_app:app"


def register() -> None:
    """Install the hooks of this process.

    After an error, the server runs without Updraft. But with a file of API keys, a server that does not require them must not
    start. Then this raises SystemExit, because SGLang only logs other exceptions of a plugin.
    """
    try:
        _register()
    except Exception as error:
        log.exception("Updraft cannot start")
        if os.environ.get(_KEYS):
            refuse(f"{type(error).__name__}: {error}")


def _register() -> None:
    settings = Settings.from_environment(os.environ, PREFIX)
    if settings is None and not os.environ.get(_KEYS):
        log.info("Updraft is inactive because %sSOCKET is not set", PREFIX)
        return
    _name_server()
    http = http_process()
    _name_application()
    http.found = found = hooks.install(http.bindings)
    certificates.follow()
    rendezvous.keep_local(configuration.is_one_node)
    if http.needs_keys:
        refuse(misfit(found))
    if settings is not None:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType  # noqa: PLC0415  (only if active)

        for binding in Plugin(settings, found).bindings:
            HookRegistry.register(binding.target, binding.hook, HookType.AROUND)


def _name_server() -> None:
    """Set variables that child processes inherit."""
    os.environ.setdefault(_SERVER, uuid.uuid4().hex)
    os.environ.setdefault(_SECRET, secrets.token_hex())


def _name_application() -> None:
    """Let each of several HTTP processes import our application, which adds the middleware."""
    if os.environ.get(names.APP_PATH) != _APP_OF_OURS:
        os.environ[APP] = os.environ.get(names.APP_PATH, _APP_OF_SGLANG)
        os.environ[names.APP_PATH] = _APP_OF_OURS


@cache
def http_process() -> HttpProcess:
    """The hooks of this process if it is an HTTP process. Raises KeysError or ValueError if the settings are invalid."""
    door = DoorSettings.from_environment(os.environ, PREFIX)
    socket = os.environ.get(f"{PREFIX}SOCKET", "")
    return HttpProcess(door, os.environ[_SECRET], version=configuration.version(), socket=socket)


class Plugin:
    """The hooks in the scheduler's process. `http`: those of the HTTP process, and why they are not in place."""

    def __init__(self, settings: Settings, http: Mapping[str, str]) -> None:
        secret, server = os.environ.get(_SECRET, ""), os.environ.get(_SERVER, "")
        selection = Selection(secret)
        self.scheduler = SchedulerRole(settings, selection, http, server=server, secret=secret)
        self.worker = WorkerRole(settings, selection, server)
        start = Binding(target=names.START, hook=self.start, parameters=("self",))
        self.bindings = (start, *self.scheduler.bindings, *self.worker.bindings)
        """All hooks to register."""

    def start(self, original: Hook, scheduler: Any, *args: Any, **kwargs: Any) -> None:
        """AROUND Scheduler.__init__: once its workers exist, share the draft's vocabulary, check the hooks and connect."""
        original(scheduler, *args, **kwargs)
        try:
            share_vocabulary(scheduler.draft_worker)
        except AttributeError as error:
            log.error("Updraft cannot exchange draft vocabularies (SGLang %s): %s", configuration.version(), error)
        try:
            if not configuration.is_sender():
                return
            if configuration.several_ranks():
                self.worker.watch()
            self.scheduler.check()
            self.worker.check(scheduler.draft_worker)
        except Exception as error:  # noqa: BLE001  (it would crash the server)
            problem = f"the plugin could not start: {type(error).__name__}: {error}"
            self.scheduler.channel.problem = self.worker.channel.problem = self.worker.no_swap = problem
        self.scheduler.channel.start()
        self.worker.channel.start()
