"""The cost of a thousand resources for one operator. See README.md in this folder."""

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil
from bench import harness
from bench.harness import Line, Measurements
from bench.operator.registries import registries
from rich.table import Table
from tests.cluster import crds
from tests.cluster.access import Api, audited
from tests.cluster.control_plane import ControlPlane, control_plane
from tests.support.operator import OperatorProcess
from tests.support.wait import wait_until

from updraft_cli import output, results
from updraft_operator.api import names
from updraft_operator.watching.cluster import KINDS

SEED = 17
SPECULATORS, PODS_EACH, NAMESPACES = 1000, 4, 50
CHANGES_PER_S, CHANGES_S = 20.0, 30.0
NUMBERS_S = 5.0
"""How often the numbers of a registry move."""
IDLE_S = 30.0
MB = 1e6
_CLIENTS = 8
_LONG_S = 900.0
_QUIET_S = 5.0
_SETTLED_S = 60.0
"""Two periods of a status: nothing that connecting caused is due later."""
_SETTLE_LIMIT_S = 300.0
_WRITES = ("create", "patch", "update", "delete")
_AGENT = "updraft-operator"


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorRun:
    speculators: int
    pods: int
    making_s: float
    """Until the operator had created all objects of all resources."""
    listing_s: float
    """After a restart with everything in place: until it had reconciled every resource."""
    memory_bytes: int
    """Resident memory of the restarted process at the end."""
    peak_bytes: int
    """Peak of the process that created everything."""
    idle_writes: int
    idle_s: float
    idle_cpu_percent: float
    settling_s: float
    """From connecting to registries until no plan was made for `_SETTLED_S`; infinite if that took too long."""
    moving_cpu_percent: float
    """While numbers of all registries move, and nothing else changes."""
    moving_plans: int
    moving_writes: int
    delays_s: tuple[float, ...]
    """From a change of a spec to the write of the changed object, by the API server's audit log."""

    @property
    def p99_s(self) -> float:
        """99th percentile of the delays; infinite if a change had no effect."""
        return sorted(self.delays_s)[int(0.99 * len(self.delays_s))]

    @property
    def idle_writes_per_minute(self) -> float:
        return 60 * self.idle_writes / self.idle_s


def run_operator(speculators: int) -> OperatorRun:
    """Measure with this many resources, on a separate control plane."""
    with (
        tempfile.TemporaryDirectory(prefix="updraft-") as folder,
        control_plane(has_controllers=False) as cluster,
        registries(NUMBERS_S) as port,
    ):
        # A name for each, because gRPC shares one connection between channels to the same address.
        settings = {"resync_seconds": 300, "registry_address": f"{{name}}.localhost:{port}"}
        with cluster.api() as api:
            crds.install(api)
            keys = _keys(speculators)
            for namespace in sorted({namespace for namespace, _ in keys} | {"updraft-system"}):
                api.create("/api/v1/namespaces", {"metadata": {"name": namespace}})
                accounts = f"/api/v1/namespaces/{namespace}/serviceaccounts"
                api.create(accounts, {"metadata": {"name": "default"}})  # as the controller manager would
            own = "/api/v1/namespaces/updraft-system/serviceaccounts"
            api.create(own, {"metadata": {"name": "updraft-operator"}})  # for its tokens
        _progress(f"Creating {speculators} resources and {speculators * PODS_EACH} pods ...")
        _at_once(cluster, keys, _make)
        _progress("The operator makes their objects ...")
        with OperatorProcess(cluster.kubeconfig, Path(folder) / "first.log", **settings) as first:
            making_s = _until_done(first, speculators)
            peak_bytes = _memory(first)
        _progress(f"That took {making_s:.0f} s and {peak_bytes / MB:.0f} MB. It starts again ...")
        with OperatorProcess(cluster.kubeconfig, Path(folder) / "second.log", **settings) as second:
            listing_s = _until_done(second, speculators)
            _progress(f"That took {listing_s:.0f} s. Nothing changes for {IDLE_S:.0f} s ...")
            process = psutil.Process(second.pid)
            process.cpu_percent()
            before = _writes(cluster)
            time.sleep(IDLE_S)
            idle_writes, idle_percent = _writes(cluster) - before, process.cpu_percent()
            _progress(f"{idle_writes} writes, {idle_percent:.1f} % of a core.")
            _progress(f"Numbers of {speculators} registries move every {NUMBERS_S:.0f} s, for {IDLE_S:.0f} s ...")
            _at_once(cluster, keys, _start_registry)
            settling_s = _settling_s(second, speculators)
            moving = _moving(cluster, second)
            _progress(
                f"{moving[0]:.1f} % of a core, {moving[1]} plans, {moving[2]} writes, {_memory(second) / MB:.0f} MB."
            )
            _progress(f"{CHANGES_PER_S:.0f} changes per second for {CHANGES_S:.0f} s ...")
            delays = _change(cluster, keys)
            return OperatorRun(
                speculators=speculators,
                pods=speculators * PODS_EACH,
                making_s=making_s,
                listing_s=listing_s,
                memory_bytes=_memory(second),
                peak_bytes=peak_bytes,
                idle_writes=idle_writes,
                idle_s=IDLE_S,
                idle_cpu_percent=idle_percent,
                settling_s=settling_s,
                moving_cpu_percent=moving[0],
                moving_plans=moving[1],
                moving_writes=moving[2],
                delays_s=delays,
            )


def _keys(speculators: int) -> list[tuple[str, str]]:
    return [(f"bench-{number % NAMESPACES}", f"model-{number}") for number in range(speculators)]


def _make(api: Api, key: tuple[str, str]) -> None:
    """A resource, and pods as its Deployments would have them, all ready."""
    namespace, name = key
    resource = KINDS["AdaptiveSpeculator"].path(namespace)
    body = {"apiVersion": names.API_VERSION, "kind": "AdaptiveSpeculator", "metadata": {"name": name}}
    api.create(resource, {**body, "spec": {"targetModel": {"uri": "/models/target"}, "serving": {"replicas": 2}}})
    pods = f"/api/v1/namespaces/{namespace}/pods"
    parts = (names.SERVING, names.SERVING, names.TRAINER, names.REGISTRY)
    for number, part in enumerate(parts):
        pod = f"{name}-{part}-{number}"
        spec = {"containers": [{"name": part, "image": "bench"}], "automountServiceAccountToken": False}
        api.create(pods, {"metadata": {"name": pod, "labels": names.labels(name, part)}, "spec": spec})
        ready = {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}
        api.patch(f"{pods}/{pod}/status", {"status": {"phase": "Running", "conditions": [ready]}})


def _at_once(
    cluster: ControlPlane, keys: Iterable[tuple[str, str]], act: Callable[[Api, tuple[str, str]], None]
) -> None:
    def share(number: int) -> None:
        with cluster.api() as api:
            for key in list(keys)[number::_CLIENTS]:
                act(api, key)

    with ThreadPoolExecutor(_CLIENTS) as clients:
        list(clients.map(share, range(_CLIENTS)))


def _until_done(operator: OperatorProcess, speculators: int) -> float:
    """Seconds from now, right after its start, until every resource was reconciled and the queue is empty.

    Some resources are reconciled twice, so it is done when nothing more happens for a while.
    """
    began, last, last_count = time.monotonic(), time.monotonic(), -1.0

    def is_done() -> bool:
        nonlocal last, last_count
        count = operator.metric('updraft_operator_reconcile_duration_seconds_count{result="done"}')
        if count != last_count or operator.metric("updraft_operator_queue_depth"):
            last, last_count = time.monotonic(), count
        return count >= speculators and time.monotonic() - last > _QUIET_S

    wait_until(is_done, timeout_s=_LONG_S, what="all resources to be reconciled")
    return last - began


def _start_registry(api: Api, key: tuple[str, str]) -> None:
    """Say that its pod is ready, as the controller manager would: the operator connects then."""
    namespace, name = key
    path = KINDS["StatefulSet"].path(namespace, names.child(name, names.REGISTRY))
    api.patch(f"{path}/status", {"status": {"replicas": 1, "readyReplicas": 1}})


def _settling_s(operator: OperatorProcess, speculators: int) -> float:
    """Wait until all registries are connected, and then until no more plans follow from that."""
    began = time.monotonic()
    connected = "updraft_operator_registry_connections"
    wait_until(lambda: operator.metric(connected) >= speculators, timeout_s=_LONG_S, what="connections")
    connected_s = last = time.monotonic()
    last_plans = -1.0

    def is_settled() -> bool:
        nonlocal last, last_plans
        plans, now = operator.metric("updraft_operator_plans_total"), time.monotonic()
        if plans != last_plans:
            last, last_plans = now, plans
        return now - last > _SETTLED_S or now - connected_s > _SETTLE_LIMIT_S

    wait_until(is_settled, timeout_s=_LONG_S, what="plans to stop")
    if time.monotonic() - last > _SETTLED_S:
        return last - began
    _progress(f"Plans did not stop within {_SETTLE_LIMIT_S:.0f} s, so what follows contains those of connecting.")
    return float("inf")


def _moving(cluster: ControlPlane, operator: OperatorProcess) -> tuple[float, int, int]:
    """CPU in percent of a core, plans and writes while only numbers move."""
    process = psutil.Process(operator.pid)
    process.cpu_percent()
    plans, writes = operator.metric("updraft_operator_plans_total"), _writes(cluster)
    time.sleep(IDLE_S)
    percent = process.cpu_percent()
    return percent, int(operator.metric("updraft_operator_plans_total") - plans), _writes(cluster) - writes


def _change(cluster: ControlPlane, keys: list[tuple[str, str]]) -> tuple[float, ...]:
    """Change serving.replicas of one resource after another. Returns how long each change took to reach its Deployment."""
    chosen = random.Random(SEED).sample(keys, min(len(keys), int(CHANGES_PER_S * CHANGES_S)))
    began = time.monotonic()
    started = datetime.now(UTC).isoformat()
    with cluster.api() as api:
        for number, (namespace, name) in enumerate(chosen):
            time.sleep(max(0.0, began + number / CHANGES_PER_S - time.monotonic()))
            path = KINDS["AdaptiveSpeculator"].path(namespace, name)
            api.patch(path, {"spec": {"serving": {"replicas": 3}}})
    time.sleep(5.0)
    changed: dict[tuple[str, str], datetime] = {}
    written: dict[tuple[str, str], datetime] = {}
    for entry in audited(cluster.audit_log):
        if entry.time < started or entry.verb != "patch":
            continue
        at = datetime.fromisoformat(entry.time)
        if entry.resource == names.SPECULATORS and not entry.agent.startswith(_AGENT):
            changed[entry.namespace, entry.name] = at
        elif entry.resource == "deployments" and entry.agent.startswith(_AGENT):
            written.setdefault((entry.namespace, entry.name.removesuffix(f"-{names.SERVING}")), at)
    return tuple((written[key] - at).total_seconds() if key in written else float("inf") for key, at in changed.items())


def _writes(cluster: ControlPlane) -> int:
    """Number of the operator's writes so far, except those of its Lease."""
    return sum(
        entry.verb in _WRITES and entry.agent.startswith(_AGENT) and entry.resource != "leases"
        for entry in audited(cluster.audit_log)
    )


def _memory(operator: OperatorProcess) -> int:
    return int(psutil.Process(operator.pid).memory_info().rss)


def bars(run: OperatorRun) -> tuple[results.Bar, ...]:
    """The bars for a thousand resources; nothing is measured with fewer."""

    def at_most(name: str, measured: float, target: float, unit: str = "") -> results.Bar:
        return results.at_most(name, measured if run.speculators == SPECULATORS else None, target, unit)

    return (
        at_most("creation of all objects of 1,000 resources", run.making_s, 120, "s"),
        at_most("restart: all resources listed and reconciled", run.listing_s, 120, "s"),
        at_most("operator's memory", max(run.memory_bytes, run.peak_bytes) / MB, 300, "MB"),
        at_most("writes per minute when nothing changes", run.idle_writes_per_minute, 0),
        at_most("CPU time while numbers of 1,000 registries move", run.moving_cpu_percent, 50, "%"),
        at_most("change of a spec to write of its Deployment, p99", run.p99_s, 1.0, "s"),
    )


def figures_table(run: OperatorRun) -> Table:
    table = output.table("figure", ">measured")
    rows = (
        ("resources", run.speculators, ""),
        ("pods", run.pods, ""),
        ("creation of all objects", run.making_s, "s"),
        ("restart: all resources listed and reconciled", run.listing_s, "s"),
        ("peak memory during creation", run.peak_bytes / MB, "MB"),
        ("memory after the restart", run.memory_bytes / MB, "MB"),
        ("writes per minute when nothing changes", run.idle_writes_per_minute, ""),
        ("CPU time when nothing changes", run.idle_cpu_percent, "%"),
        ("connecting to registries, until no plan follows", run.settling_s, "s"),
        ("CPU time while numbers of registries move", run.moving_cpu_percent, "%"),
        ("  plans meanwhile", run.moving_plans, ""),
        ("  writes meanwhile", run.moving_writes, ""),
        ("change of a spec to write of its Deployment, median", statistics.median(run.delays_s), "s"),
        ("  p99", run.p99_s, "s"),
    )
    for name, figure, unit in rows:
        table.add_row(name, results.number(figure, unit))
    return table


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def measure(arguments: argparse.Namespace) -> Measurements:
    run = run_operator(arguments.speculators)
    return Measurements(
        seed=SEED,
        lines=[Line(bar) for bar in bars(run)],
        samples=[asdict(run)],
        figures=[figures_table(run)],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--speculators", type=int, default=SPECULATORS, help=f"resources (default {SPECULATORS})")
    harness.run("operator", parser, measure)


if __name__ == "__main__":
    main()
