"""The operator process: everything is built here, once, and taken down in reverse."""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from prometheus_client import CollectorRegistry

from updraft_chassis import lifecycle, logs, metrics
from updraft_chassis.clock import Clock, SystemClock
from updraft_chassis.errors import NotFound, Unavailable, UpdraftError
from updraft_operator.metrics import Metrics
from updraft_operator.planning.objects import Key
from updraft_operator.reconcile import Reconciler, Wiring
from updraft_operator.registry_connections import Links
from updraft_operator.settings import OperatorSettings
from updraft_operator.watching.handlers import Watches
from updraft_operator.watching.kubernetes_cluster import TIMEOUT_S, KubernetesCluster, connected
from updraft_operator.watching.leader import TRUST, Always, Lease, LeaseName
from updraft_operator.watching.resync import FIRST_S, Resync
from updraft_operator.watching.secrets import FRESH_S, Secrets
from updraft_operator.watching.store import Store
from updraft_operator.watching.work_queue import Work

logger = logging.getLogger(__name__)

PROCESS = "updraft-operator"

_CRD_WAIT_S = 5.0
_FIRST_LOOKS_S = 0.5
_STANDBY_S = 0.2

_FROZEN_RESYNCS = 3
"""Listings in a row that did not come about until the process is taken for stuck."""


def run(config: OperatorSettings) -> None:
    """Run until SIGTERM or SIGINT."""
    logs.configure(process="operator", level=config.log_level, format=config.log_format)
    for noisy in ("kopf", "kubernetes", "aiohttp"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLogger().level))
    logging.getLogger("kopf._core.reactor.running").setLevel(logging.ERROR)  # that signals are not its business
    lifecycle.run(PROCESS, partial(serve, config))


async def serve(config: OperatorSettings, stop: lifecycle.Stop) -> None:
    """Watch, and work while leading, until `stop`."""
    clock, collectors = SystemClock(), CollectorRegistry()
    measures = Metrics.on(collectors)
    async with AsyncExitStack() as stack:
        gate = _Gate()
        cluster = await stack.enter_async_context(
            connected(gate.check, lambda kind, verb: measures.writes.labels(kind, verb).inc(), write_s=_write_s(config))
        )
        lease_cluster = await stack.enter_async_context(connected())
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="updraft-operator-")))
        store = Store()
        work = Work(clock.monotonic)
        resync = Resync(store, cluster, clock, measures, config.namespaces)
        port = stack.enter_context(
            metrics.serve(
                collectors,
                host=config.host,
                port=config.metrics_port,
                ready=lambda: resync.synced_s is not None,
                alive=_alive(resync, config.resync_seconds),
                setting="UPDRAFT_OPERATOR_METRICS_PORT",
            )
        )
        measures.watch_age.set_function(lambda: resync.agreed_age_s)
        measures.queue.set_function(lambda: len(work))
        measures.speculators.set_function(lambda: len(store.speculators()))
        logger.info("Operator starts", extra={"metrics_port": port, "namespaces": config.watch_namespaces or "all"})
        await _until_served(cluster.metadata, config.namespaces, stop)
        if stop.requested:
            return
        resync.begin()

        lease = _lease(config, lease_cluster, clock, partial(_on_change, store, work, measures))
        gate.lease = lease
        async with asyncio.TaskGroup() as tasks:
            links = Links(tasks, clock, work.add, folder)
            measures.connections.set_function(lambda: len(links))
            wiring = Wiring(
                store=store,
                cluster=cluster,
                secrets=Secrets(cluster, clock, min(FRESH_S, config.resync_seconds / 2)),
                links=links,
                metrics=measures,
                clock=clock,
                around=config.surroundings,
                redis_url=config.redis_url.get_secret_value(),
                registry_address=config.registry_address,
                status_s=config.status_seconds,
                cleanup_s=config.cleanup_seconds,
                is_dry_run=config.dry_run,
                guard=gate.check,
            )
            await _work(tasks, config, wiring, _Machinery(work=work, resync=resync, lease=lease), stop)


def _lease(
    config: OperatorSettings, cluster: KubernetesCluster, clock: Clock, on_change: Callable[[bool], None]
) -> Lease | Always:
    if not config.leader_election:
        on_change(True)  # noqa: FBT003 - it leads
        return Always()
    name = LeaseName(
        namespace=config.namespace, name=config.lease_name, identity=config.identity, seconds=config.lease_seconds
    )
    return Lease(cluster, name, clock, on_change)


def _on_change(store: Store, work: Work, measures: Metrics, is_leader: bool) -> None:  # noqa: FBT001 - what changed
    """A new leader looks at everything."""
    measures.leader.set(is_leader)
    for key in store.all_keys() if is_leader else ():
        work.add(key)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Machinery:
    work: Work
    resync: Resync
    lease: Lease | Always


async def _work(
    tasks: asyncio.TaskGroup, config: OperatorSettings, wiring: Wiring, machinery: _Machinery, stop: lifecycle.Stop
) -> None:
    """Watch and work until `stop`; then finish in order: no more work, the Lease given back, no more watches."""
    reconciler, work, lease = Reconciler(wiring), machinery.work, machinery.lease
    watches = Watches(wiring.store, work.add, config.namespaces)
    watching = tasks.create_task(watches.run())
    background = [tasks.create_task(_resync(machinery.resync, wiring.store, work, reconciler, config.resync_seconds))]
    looks = (_worker(machinery, reconciler, wiring.metrics) for _ in range(config.workers))
    background += [tasks.create_task(look) for look in looks]
    let_go = lifecycle.Stop()
    leading = tasks.create_task(lease.run(let_go)) if isinstance(lease, Lease) else None
    await stop.wait()
    for task in background:
        task.cancel()
    wiring.links.close()
    await asyncio.wait(background)
    let_go.request()
    if leading is not None:
        await leading
    watches.end()
    await watching


class _Gate:
    """Lets writes through while the Lease is held; before there is one, none."""

    def __init__(self) -> None:
        self.lease: Lease | Always | None = None

    def check(self) -> None:
        if self.lease is None:
            raise Unavailable("no replica leads yet")
        self.lease.check()


async def _until_served(metadata: Callable[..., object], namespaces: tuple[str, ...], stop: lifecycle.Stop) -> None:
    """Wait until both kinds are served: the operator may be there before its definitions."""
    said = ""
    while not stop.requested:
        try:
            for kind in ("AdaptiveSpeculator", "DraftVersion"):
                await metadata(kind, (namespaces or ("",))[0])  # type: ignore[misc]
        except NotFound:
            why = "the CustomResourceDefinitions of updraft.dev are not installed"
        except UpdraftError as error:
            why = str(error)
        else:
            return
        if why != said:
            said = why
            logger.warning("Waiting", extra={"for": why})
        await stop.wait(_CRD_WAIT_S)


def _alive(resync: Resync, period_s: float) -> Callable[[], bool]:
    """Stuck: nothing could be listed for long, or the watches missed something time and again."""
    limit_s = _FROZEN_RESYNCS * period_s + min(FIRST_S, period_s)
    return lambda: resync.age_s < limit_s and resync.num_missed < _FROZEN_RESYNCS


def _write_s(config: OperatorSettings) -> float:
    """What is left of the Lease once it is no longer believed in."""
    return max(1.0, (1 - TRUST) * config.lease_seconds) if config.leader_election else TIMEOUT_S


async def _resync(resync: Resync, store: Store, work: Work, reconciler: Reconciler, period_s: float) -> None:
    """List everything now and then; the first time as soon as the watches have said all."""
    while True:
        try:
            await resync.run_once(work.add)
        except UpdraftError as error:
            logger.warning("Not everything could be listed", extra={"error": str(error)})
            await asyncio.sleep(_FIRST_LOOKS_S if resync.synced_s is None else _CRD_WAIT_S)
            continue
        reconciler.retry_refused()
        for key in store.all_keys():
            work.add(key)
        await asyncio.sleep(period_s)


async def _worker(machinery: _Machinery, reconciler: Reconciler, measures: Metrics) -> None:
    work, lease, resync = machinery.work, machinery.lease, machinery.resync
    while True:
        key, waited_s = await work.take()
        try:
            if lease.is_held and resync.synced_s is not None:
                measures.delay.observe(waited_s)
                await _look(key, work, reconciler, measures)
            elif lease.is_held:
                work.add_after(key, _STANDBY_S)
        finally:
            work.done(key)


async def _look(key: Key, work: Work, reconciler: Reconciler, measures: Metrics) -> None:
    started_s = time.monotonic()
    try:
        again_s = await reconciler.reconcile(key)
    except UpdraftError as error:
        measures.reconcile.labels("failed").observe(time.monotonic() - started_s)
        measures.errors.labels(type(error).__name__).inc()
        logger.warning("Will look again", extra={"speculator": str(key), "error": str(error)})
        work.retry(key, getattr(error, "retry_after_s", None) or 0.0)
        return
    except Exception:  # a bug that one resource brings to light must not stop the work on all others
        measures.reconcile.labels("failed").observe(time.monotonic() - started_s)
        measures.errors.labels("bug").inc()
        logger.exception("A look failed", extra={"speculator": str(key)})
        work.retry(key)
        return
    measures.reconcile.labels("done").observe(time.monotonic() - started_s)
    work.went_well(key)
    if again_s is not None:
        work.add_after(key, again_s)
