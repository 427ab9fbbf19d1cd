"""The registry process: builds all parts, and takes them down in reverse order."""

import asyncio
import logging
import resource
import sys
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

from prometheus_client import CollectorRegistry

from updraft.fleet.v1 import fleet_pb2_grpc
from updraft.registry.v1 import registry_pb2_grpc
from updraft_chassis import lifecycle, logs, metrics, rpc, settings
from updraft_chassis.access import Access, Authority, Tokens
from updraft_chassis.clock import Clock, SystemClock
from updraft_registry.api.deltas import Deltas
from updraft_registry.api.fetching import Fetching, Limits
from updraft_registry.api.fleet_servicer import FleetServicer
from updraft_registry.api.servicer import RegistryServicer
from updraft_registry.control import Control
from updraft_registry.fleet import Fleet
from updraft_registry.identity.keys import KeySet, read_file, read_url
from updraft_registry.identity.service_accounts import Expected, ServiceAccounts, parse_accounts
from updraft_registry.metrics import Metrics
from updraft_registry.settings import RegistrySettings
from updraft_registry.storage import maintenance
from updraft_registry.storage.archive import open_archive
from updraft_registry.storage.stores.choice import store_of

logger = logging.getLogger(__name__)

_GRACE_S = 5.0
"""Time for running fetches to finish on shutdown. Clients resume the rest."""

_LOOPBACK = {"127.0.0.1", "::1", "localhost"}


def main() -> None:
    """Run until SIGTERM or SIGINT; with arguments, a command of `maintenance`."""
    if sys.argv[1:]:
        raise SystemExit(maintenance.main(sys.argv[1:]))
    config = settings.load(RegistrySettings)
    _allow_many_files()
    logs.configure(process="registry", level=config.log_level, format=config.log_format)
    lifecycle.run("updraft-registry", partial(serve, config))


async def serve(config: RegistrySettings, stop: lifecycle.Stop) -> None:
    """Serve until `stop`; UpdraftError if the start fails."""
    collectors = CollectorRegistry()
    measures = Metrics(collectors)
    clock = SystemClock()
    with ExitStack() as stack:
        archive = stack.enter_context(
            open_archive(
                config.data_dir,
                defaults=config.policy,
                max_draft_bytes=config.max_draft_bytes,
                store=store_of(config),
            )
        )
        control = Control(archive, Fleet(), clock, measures, settle_s=config.settle_seconds)
        stack.callback(control.join)
        deltas = Deltas(config.data_dir / "deltas", archive.store, max_bytes=config.delta_cache_bytes, metrics=measures)
        stack.callback(deltas.close)
        limits = Limits(max_fetches=config.max_fetches, stall_s=config.fetch_stall_seconds)
        fetching = Fetching(archive, control, deltas, measures, limits)
        stack.callback(fetching.close)
        metrics_port = stack.enter_context(
            metrics.serve(
                collectors,
                host=config.host,
                port=config.metrics_port,
                ready=lambda: control.is_ready,
                setting="UPDRAFT_REGISTRY_METRICS_PORT",
                tls=config.tls.context() if config.metrics_tls and config.tls is not None else None,
            )
        )
        keys = _key_set(config, clock, measures)
        access = _access(config, keys, clock, measures)
        server = rpc.server(access)
        servicer = RegistryServicer(archive, control, fetching, deltas, measures)
        registry_pb2_grpc.add_RegistryServicer_to_server(servicer, server)
        fleet_pb2_grpc.add_FleetServicer_to_server(FleetServicer(control, measures), server)
        port = rpc.bind(server, host=config.host, port=config.port, setting="UPDRAFT_REGISTRY_PORT", tls=config.tls)
        recovered = archive.recover(control.now_ms())
        facts = {"host": config.host, "port": port, "metrics_port": metrics_port, **asdict(recovered)}
        async with asyncio.TaskGroup() as tasks:
            background = [tasks.create_task(control.run()), *([] if keys is None else [tasks.create_task(keys.run())])]
            await server.start()
            logger.info("Registry serves", extra=facts)
            try:
                await stop.wait()
            finally:
                control.close()
                await server.stop(_GRACE_S)
                for task in background:
                    task.cancel()


def _allow_many_files() -> None:
    """Raise the limit of open files, which is often 1,024, because every pod is a connection."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _access(config: RegistrySettings, keys: KeySet | None, clock: Clock, measures: Metrics) -> Access | None:
    """Access rules; None: every client may call everything. Logs what is not protected."""
    level = logging.INFO if config.host in _LOOPBACK else logging.WARNING
    authorities: list[Authority] = [] if config.tokens_file is None else [Tokens(config.tokens_file)]
    if keys is not None:
        accounts = parse_accounts(config.accounts)
        expected = Expected(issuer=config.issuer, audience=config.audience, accounts=accounts)
        authorities.append(ServiceAccounts(expected, keys, clock))
    if not authorities:
        logger.log(
            level,
            "Neither UPDRAFT_REGISTRY_TOKENS_FILE nor UPDRAFT_REGISTRY_ISSUER is set: every client may call everything",
        )
        return None
    if config.tls is None:
        logger.log(level, "UPDRAFT_REGISTRY_TLS_CERT_FILE is not set: tokens are sent in plaintext")
    return Access(*authorities, on_denied=lambda status: measures.denied.labels(status).inc())


def _key_set(config: RegistrySettings, clock: Clock, measures: Metrics) -> KeySet | None:
    if not config.issuer:
        return None
    if config.key_set.startswith("https://"):
        files = {"token_file": config.key_set_token_file, "ca_file": config.key_set_ca_file}
        fetch = partial(read_url, config.key_set, **files)
    else:
        fetch = partial(read_file, Path(config.key_set))
    return KeySet(fetch, clock, lambda is_ok: measures.key_fetches.labels("ok" if is_ok else "failed").inc())
