"""The registry process: everything is built here, once, and taken down in reverse."""

import asyncio
import logging
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial

from prometheus_client import CollectorRegistry

from updraft.fleet.v1 import fleet_pb2_grpc
from updraft.registry.v1 import registry_pb2_grpc
from updraft_chassis import lifecycle, logs, metrics, rpc, settings
from updraft_chassis.clock import SystemClock
from updraft_registry.archive import open_archive
from updraft_registry.control import Control
from updraft_registry.fleet import Fleet
from updraft_registry.fleet_servicer import FleetServicer
from updraft_registry.metrics import Metrics
from updraft_registry.servicer import RegistryServicer
from updraft_registry.settings import RegistrySettings

logger = logging.getLogger(__name__)

_GRACE_S = 5.0
"""Streams end at once when asked; this is for fetches that run. Clients resume what is cut."""


def main() -> None:
    """Run until SIGTERM or SIGINT."""
    config = settings.load(RegistrySettings)
    logs.configure(process="registry", level=config.log_level, format=config.log_format)
    lifecycle.run("updraft-registry", partial(serve, config))


async def serve(config: RegistrySettings, stop: lifecycle.Stop) -> None:
    """Serve until `stop`; UpdraftError if the start fails."""
    collectors = CollectorRegistry()
    measures = Metrics.on(collectors)
    clock = SystemClock()
    with ExitStack() as stack:
        archive = stack.enter_context(
            open_archive(config.data_dir, defaults=config.policy, max_draft_bytes=config.max_draft_bytes)
        )
        control = Control(archive, Fleet(), clock, measures)
        stack.callback(control.join)
        metrics_port = stack.enter_context(
            metrics.serve(
                collectors,
                host=config.host,
                port=config.metrics_port,
                ready=lambda: control.is_ready,
                setting="UPDRAFT_REGISTRY_METRICS_PORT",
            )
        )
        server = rpc.server()
        registry_pb2_grpc.add_RegistryServicer_to_server(RegistryServicer(archive, control, measures), server)
        fleet_pb2_grpc.add_FleetServicer_to_server(FleetServicer(control), server)
        port = rpc.bind(server, host=config.host, port=config.port, setting="UPDRAFT_REGISTRY_PORT")
        recovered = archive.recover(control.now_ms())
        facts = {"host": config.host, "port": port, "metrics_port": metrics_port, **asdict(recovered)}
        async with asyncio.TaskGroup() as tasks:
            deciding = tasks.create_task(control.run())
            await server.start()
            logger.info("Registry serves", extra=facts)
            try:
                await stop.wait()
            finally:
                control.close()
                await server.stop(_GRACE_S)
                deciding.cancel()


if __name__ == "__main__":
    main()
