"""kopf, in one file: it watches, and reports which speculator an event belongs to. It decides and writes nothing.

Only low-level event handlers are registered, which leave no finalizer and no annotation on any object. kopf runs in a
thread with its own event loop, because it exits on an answer that it does not handle (410 to a listing, an ERROR in a
watch) and then cancels all tasks of its loop; the process must not end with it. It also starts a task per listed object
at once, so it gets the next page of a listing only when few of them are left.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import kopf
from kopf._core.reactor.inventory import ResourceMemories, ResourceMemory

from updraft_chassis.retry import Backoff
from updraft_operator.api import names
from updraft_operator.planning.objects import Key
from updraft_operator.watching.cluster import CHILDREN, KINDS, OPTIONAL
from updraft_operator.watching.store import Store, key_of

logger = logging.getLogger(__name__)

Add = Callable[[Key], None]
OnEvent = Callable[[str, kopf.RawEvent], object]
"""Receives the events of a kind."""

_AGAIN_S = 30.0
"""Maximum delay before a restart; meanwhile the resync finds changes."""

_CANCELS, _CANCEL_S = 20, 0.5
"""kopf itself cancels once and waits without limit, but a watch that is renewing its credentials loses the first cancel."""

_PAGE = 25
"""Objects. The first pages of all kinds are in memory at the same time, with everything that they become in kopf."""

WORKER = "worker for "
"""The beginning of the names of kopf's tasks for objects with a recent event."""

MAX_WORKERS = 200
"""Above this number of them, the next page of a listing waits."""

_PACE_S, _MOST_WAITS = 0.1, 100


class Watches:
    """`run` fills the store and calls `add`, or `add_measured` for a change of status alone, in its own loop, until `end`."""

    def __init__(
        self, store: Store, add: Add, add_measured: Add, namespaces: tuple[str, ...], kinds: Iterable[str]
    ) -> None:
        self._store = store
        self._add = add
        self._add_measured = add_measured
        self._namespaces = namespaces
        self._kinds = tuple(kinds)
        self._stop = threading.Event()
        """Stops the current run of kopf."""
        self._end = asyncio.Event()

    def end(self) -> None:
        self._end.set()
        self._stop.set()

    async def run(self) -> None:
        """Watch, and restart the watches whenever they end; each restart lists everything again."""
        loop, backoff = asyncio.get_running_loop(), Backoff(initial_s=1.0, cap_s=_AGAIN_S)

        def on_event(kind: str, event: kopf.RawEvent) -> None:
            loop.call_soon_threadsafe(self._on_event, kind, event)

        while not self._end.is_set():
            self._stop = threading.Event()
            watching = asyncio.to_thread(
                asyncio.run, _watch(registry(on_event, self._kinds), self._namespaces, self._stop)
            )
            try:
                (error,) = await asyncio.gather(watching, return_exceptions=True)
            finally:
                self._stop.set()
            if self._end.is_set():
                return
            logger.warning("Watches ended; restarting", extra={"error": str(error or "kopf stopped")})
            try:
                async with asyncio.timeout(next(backoff)):
                    await self._end.wait()
            except TimeoutError:
                continue

    def _on_event(self, kind: str, event: kopf.RawEvent) -> None:
        body: Any = event["object"]
        add = self._add
        if event["type"] == "DELETED":
            key = key_of(kind, body)
            if key is not None:
                self._store.drop(kind, key, body["metadata"]["name"], body["metadata"]["resourceVersion"])
        elif event["type"] in ("ADDED", "MODIFIED") and self._store.tells_nothing(kind, body):
            return
        else:
            if event["type"] == "MODIFIED" and self._store.tells_only_status(kind, body):
                add = self._add_measured
            key = self._store.put(kind, body)
        if key is not None:
            add(key)


async def _watch(handlers: kopf.OperatorRegistry, namespaces: tuple[str, ...], stop: threading.Event) -> None:
    """Watch until `stop`; raises the error that ended the watches earlier."""
    roots = await kopf.spawn_tasks(
        registry=handlers,
        settings=settings(),
        memories=Forgetful(),
        standalone=True,
        clusterwide=not namespaces,
        namespaces=namespaces,
        stop_flag=stop,
    )
    ended, _ = await asyncio.wait(roots, return_when=asyncio.FIRST_COMPLETED)
    stop.set()  # a thread waits for it
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # kopf has logged what failed
    for _ in range(_CANCELS):
        if not (left := asyncio.all_tasks() - {asyncio.current_task()}):
            break
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=_CANCEL_S)
    for root in ended:
        root.result()


class Forgetful(ResourceMemories):
    """Without kopf's record of each object, of 1 kB: only kinds of handlers that this operator does not have need it."""

    async def recall(self, *args: Any, **kwargs: Any) -> ResourceMemory:
        return await super().recall(*args, **{**kwargs, "ephemeral": True})


def registry(on_event: OnEvent, kinds: Iterable[str]) -> kopf.OperatorRegistry:
    handlers = kopf.OperatorRegistry()
    for kind in kinds:
        resource = KINDS[kind]
        kopf.on.event(
            *(resource.group, resource.version, resource.plural),
            registry=handlers,
            id=f"watch-{resource.plural}",
        )(_handler(kind, on_event))
    kopf.on.login(registry=handlers, id="service-account")(login)
    return handlers


def settings() -> kopf.OperatorSettings:
    chosen = kopf.OperatorSettings()
    chosen.posting.enabled = False  # the operator emits its own Events, on transitions only
    chosen.scanning.disabled = True  # needs no permission to list CRDs or namespaces
    chosen.watching.server_timeout = 290
    chosen.watching.client_timeout = 300
    chosen.watching.connect_timeout = 10
    chosen.networking.connect_timeout = 10
    chosen.networking.request_timeout = (
        30  # of a page of a list; kopf would wait five minutes for one without an answer
    )
    chosen.watching.chunk_size = _PAGE
    chosen.queueing.idle_timeout = 0.2  # of the task of an object without further events
    chosen.networking.enforce_retry_after = True
    chosen.watching.reconnect_backoff = 0.5
    # Not the operator's own finalizer: kopf removes its finalizer from every object that no handler of its own needs.
    chosen.persistence.finalizer = f"{names.GROUP}/kopf"
    for kind in (*CHILDREN, *OPTIONAL, "Pod"):
        resource = KINDS[kind]
        where = (resource.group, resource.version, resource.plural)
        chosen.watching.label_selectors[where] = f"{names.MANAGED_BY}={names.MANAGER}"
    return chosen


def _handler(kind: str, on_event: OnEvent) -> Callable[..., Any]:
    async def handle(event: kopf.RawEvent, **_: Any) -> None:
        on_event(kind, event)

    return handle


async def paced(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """Middleware for kopf's requests: the next page of a listing waits until most of the previous page is handled, at
    most ten seconds: other objects may have events all the time."""
    for _ in range(_MOST_WAITS if "limit" in request.url.query else 0):
        if _num_workers() <= MAX_WORKERS:
            break
        await asyncio.sleep(_PACE_S)
    return await handler(request)


def _num_workers() -> int:
    """Without the tasks of the watches themselves: a few for each kind in each namespace."""
    return sum(task.get_name().startswith(WORKER) for task in asyncio.all_tasks())


@dataclass(frozen=True, kw_only=True)
class _Login(kopf.AiohttpSession):
    """Compared by its credentials, so that kopf does not retry refused ones."""

    info: kopf.ConnectionInfo
    aiohttp_session: aiohttp.ClientSession = field(compare=False)


async def login(**kwargs: Any) -> kopf.AiohttpSession | None:
    """The pod's credentials, or those of KUBECONFIG, with a session whose listings are `paced`."""
    info = kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)
    if info is None:
        return None
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, ssl=info.as_ssl_context()),
        headers=info.as_http_headers(),
        proxy=info.proxy_url,
        trust_env=info.trust_env,
        middlewares=(paced,),
    )
    return _Login(
        server=info.server,
        priority=info.priority,
        default_namespace=info.default_namespace,
        expiration=info.expiration,
        info=info,
        aiohttp_session=session,
    )
