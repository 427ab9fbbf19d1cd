"""kopf, in one file: it watches, and says which speculator something happened to. It decides and writes nothing.

Only low-level event handlers are registered, which leave no mark, no finalizer and no annotation on any object. kopf has
a thread and an event loop of its own: it ends at an answer that it has no word for (410 to a listing, an ERROR in a
watch), and then cancels all tasks of its loop. Refused: to let the process end with it. It also queues all that it lists
at once, in a task for each object; so it gets the next page of a listing only when few of them are left.
"""

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import kopf

from updraft_chassis.retry import Backoff
from updraft_operator.api import names
from updraft_operator.planning.objects import Key
from updraft_operator.watching.cluster import CHILDREN, KINDS
from updraft_operator.watching.store import Store, key_of

logger = logging.getLogger(__name__)

Add = Callable[[Key], None]
See = Callable[[str, kopf.RawEvent], object]
"""Takes what happened to an object of a kind."""

_AGAIN_S = 30.0
"""Most time between two starts; meanwhile the listings tell what happens."""

_CANCELS, _CANCEL_S = 20, 0.5
"""kopf's own end cancels once and waits without end, though a watch that asks anew for credentials loses the first."""

_PAGE = 100
MAX_TASKS = 500
"""Tasks of kopf's, one for each object that something was heard of lately, from which on no further page is asked for."""
_PACE_S = 0.1


class Watches:
    """Run `run` until `end`; fills the store and calls `add`, in the event loop of `run`."""

    def __init__(self, store: Store, add: Add, namespaces: tuple[str, ...]) -> None:
        self._store = store
        self._add = add
        self._namespaces = namespaces
        self._stop = threading.Event()
        """Ends what runs now."""
        self._end = asyncio.Event()

    def end(self) -> None:
        """Watch no more."""
        self._end.set()
        self._stop.set()

    async def run(self) -> None:
        """Watch, and start again whatever it was that ended the watches: all is listed anew then."""
        loop, backoff = asyncio.get_running_loop(), Backoff(initial_s=1.0, cap_s=_AGAIN_S)

        def see(kind: str, event: kopf.RawEvent) -> None:
            loop.call_soon_threadsafe(self._see, kind, event)

        while not self._end.is_set():
            self._stop = threading.Event()
            watching = asyncio.to_thread(asyncio.run, _watch(registry(see), self._namespaces, self._stop))
            try:
                (error,) = await asyncio.gather(watching, return_exceptions=True)
            finally:
                self._stop.set()
            if self._end.is_set():
                return
            logger.warning("The watches ended and are started again", extra={"error": str(error or "nobody asked")})
            try:
                async with asyncio.timeout(next(backoff)):
                    await self._end.wait()
            except TimeoutError:
                continue

    def _see(self, kind: str, event: kopf.RawEvent) -> None:
        body: Any = event["object"]
        if event["type"] == "DELETED":
            key = key_of(kind, body)
            if key is not None:
                self._store.drop(kind, key, body["metadata"]["name"], body["metadata"]["resourceVersion"])
        else:
            key = self._store.put(kind, body)
        if key is not None:
            self._add(key)


async def _watch(handlers: kopf.OperatorRegistry, namespaces: tuple[str, ...], stop: threading.Event) -> None:
    """Until `stop`, or raise what ended it before."""
    roots = await kopf.spawn_tasks(
        registry=handlers,
        settings=settings(),
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


def registry(see: See) -> kopf.OperatorRegistry:
    """Handlers that call `see`."""
    handlers = kopf.OperatorRegistry()
    for kind, resource in KINDS.items():
        kopf.on.event(
            *(resource.group, resource.version, resource.plural),
            registry=handlers,
            id=f"see-{resource.plural}",
        )(_seen(kind, see))
    kopf.on.login(registry=handlers, id="service-account")(login)
    return handlers


def settings() -> kopf.OperatorSettings:
    """What is set on purpose; the rest is kopf's."""
    chosen = kopf.OperatorSettings()
    chosen.posting.enabled = False  # events are ours to tell, on transitions only
    chosen.scanning.disabled = True  # no right to list definitions or namespaces is asked for
    chosen.watching.server_timeout = 290
    chosen.watching.client_timeout = 300
    chosen.watching.connect_timeout = 10
    chosen.networking.connect_timeout = 10
    chosen.watching.chunk_size = _PAGE
    chosen.queueing.idle_timeout = 0.2  # of the task of an object of which nothing more is heard
    chosen.networking.enforce_retry_after = True
    chosen.watching.reconnect_backoff = 0.5
    # Not ours: kopf takes its finalizer off whatever no handler of its own needs one for.
    chosen.persistence.finalizer = f"{names.GROUP}/kopf"
    for kind in (*CHILDREN, "Pod"):
        resource = KINDS[kind]
        where = (resource.group, resource.version, resource.plural)
        chosen.watching.label_selectors[where] = f"{names.MANAGED_BY}={names.MANAGER}"
    return chosen


def _seen(kind: str, see: See) -> Callable[..., Any]:
    async def handle(event: kopf.RawEvent, **_: Any) -> None:
        see(kind, event)

    return handle


async def paced(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """A request of kopf's; the page of a listing waits until most of what was listed before was seen."""
    while "limit" in request.url.query and len(asyncio.all_tasks()) > MAX_TASKS:  # noqa: ASYNC110 - no event tells of them
        await asyncio.sleep(_PACE_S)
    return await handler(request)


@dataclass(frozen=True, kw_only=True)
class _Login(kopf.AiohttpSession):
    """Equal to another one by its credentials: kopf does not try those again that were refused."""

    info: kopf.ConnectionInfo
    aiohttp_session: aiohttp.ClientSession = field(compare=False)


async def login(**kwargs: Any) -> kopf.AiohttpSession | None:
    """The credentials of the pod, else those of KUBECONFIG, with a session whose listings are `paced`."""
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
