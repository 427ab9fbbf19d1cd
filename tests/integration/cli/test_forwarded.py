"""A cluster's registries are read at the same time: one that hangs delays neither the others nor the resources."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import grpc
import pytest
from tests.support import speculator_objects as objects
from tests.support.api_server import ApiServer, api_server
from tests.support.checkpoints import draft
from tests.support.registry import CALL_S, RegistryProcess, parts
from tests.support.wait import LONG_S, wait_until

from updraft.registry.v1 import registry_pb2 as pb
from updraft.registry.v1.registry_pb2_grpc import RegistryStub
from updraft_chassis.errors import Unavailable
from updraft_cli.backends.cluster import ClusterBackend
from updraft_cli.backends.cluster_client import KubeContext
from updraft_cli.backends.forwarded import backend as backend_module
from updraft_cli.backends.forwarded import reports, tunnels
from updraft_cli.backends.forwarded.backend import ForwardedBackend, forwarded
from updraft_cli.backends.snapshot import SpeculatorSnapshot
from updraft_cli.ui.views.overview import notices

_KUBECTL = """#!/bin/sh
case "$*" in
*/{silent}-*) port={silent_port} ;;
*) port={port} ;;
esac
echo "Forwarding from 127.0.0.1:$port -> 50051"
exec sleep 600
"""


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryProcess]:
    """That of qwen, with one version."""
    with RegistryProcess(tmp_path_factory.mktemp("registry")) as process:
        weights = draft()
        with grpc.insecure_channel(process.address) as channel:
            upload = parts(weights.manifest("qwen"), weights.data)
            RegistryStub(channel).Publish(upload, timeout=CALL_S)
        yield process


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """Takes connections and says nothing, as a registry that hangs."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture
def api(
    tmp_path: Path, registry: RegistryProcess, silent: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ApiServer]:
    """Two speculators; the registry of gemma hangs, which sorts before qwen."""
    kubectl = tmp_path / "bin" / "kubectl"
    kubectl.parent.mkdir()
    kubectl.write_text(_KUBECTL.format(silent="gemma", silent_port=silent.getsockname()[1], port=registry.port))
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{kubectl.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(tunnels, "_ANSWER_S", 10 * CALL_S)
    with api_server(tmp_path) as server:
        for name in ("gemma", "qwen"):
            server.put("adaptivespeculators", objects.speculator(name))
        yield server


class Console:
    """The backend of a console, and what it has read last."""

    def __init__(self, backend: ForwardedBackend) -> None:
        self.backend = backend
        self.states = backend.snapshots()

    def one(self, name: str) -> SpeculatorSnapshot:
        one = next(self.states).speculator(name)
        assert one is not None
        return one

    def is_paused(self, reason: str) -> bool:
        """Whether the history of qwen, which only its registry has, ends with a pause for this reason."""
        return [entry.reason for entry in self.one("qwen").history][-1:] == [f"paused: {reason}"]


@contextmanager
def console(api: ApiServer) -> Iterator[Console]:
    with forwarded(ClusterBackend(context=KubeContext(kubeconfig=api.kubeconfig))) as backend:
        yield Console(backend)


def pause(registry: RegistryProcess, reason: str) -> None:
    with grpc.insecure_channel(registry.address) as channel:
        RegistryStub(channel).Pause(pb.PauseRequest(speculator="qwen", reason=reason), timeout=CALL_S)


def test_a_registry_that_hangs_delays_no_other(api: ApiServer, registry: RegistryProcess) -> None:
    with console(api) as shown:
        for reason in ("lunch", "dinner"):
            pause(registry, reason)
            wait_until(partial(shown.is_paused, reason), what=f"the pause for {reason}")
        gemma = shown.one("gemma")
        assert (gemma.history, gemma.registry_problem) == ((), "")


def test_a_registry_that_hangs_is_said_and_the_resource_stays(api: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnels, "_ANSWER_S", 0.2)
    with console(api) as shown:
        wait_until(
            lambda: "it does not answer within 0.2 s" in shown.one("gemma").registry_problem,
            what="why the registry cannot be read",
        )
        assert shown.one("gemma").speculator.namespace == "team"
        assert shown.backend.reports.registry("gemma") is None


def test_an_old_report_is_shown_with_its_time(
    api: ApiServer, registry: RegistryProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    pause(registry, "lunch")
    with console(api) as shown:
        wait_until(partial(shown.is_paused, "lunch"), what="an answer of the registry")
        monkeypatch.setattr(backend_module, "_OLD_S", -1.0)
        one = shown.one("qwen")
    assert one.reported is not None
    (notice,) = [notice.text for notice in notices(one) if "registry" in notice.text]
    assert notice.startswith("The registry is slow: ")
    assert f" as of {one.reported:%H:%M:%S}." in notice


def test_details_that_do_not_come_soon_are_not_waited_for(
    api: ApiServer, registry: RegistryProcess, silent: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports, "_DETAILS_S", 0.2)
    pause(registry, "lunch")
    with console(api) as shown:
        wait_until(partial(shown.is_paused, "lunch"), what="an answer of the registry")
        answering = shown.backend.reports.registry("qwen")
        assert answering is not None
        hanging = replace(answering, address=f"127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(Unavailable, match=r"does not answer within 0\.2 s"):
            shown.backend.reports.details("qwen", hanging.policy)
        with pytest.raises(Unavailable, match="it has not answered the last question yet"):
            shown.backend.reports.details("qwen", answering.policy)
        monkeypatch.setattr(reports, "_DETAILS_S", LONG_S)
        shown.backend.reports.details("gemma", answering.policy)


def test_a_console_that_ended_asks_no_registry_any_more(api: ApiServer, registry: RegistryProcess) -> None:
    pause(registry, "lunch")
    with console(api) as shown:
        wait_until(partial(shown.is_paused, "lunch"), what="an answer of the registry")
        answering = shown.backend.reports.registry("qwen")
    assert answering is not None
    with pytest.raises(Unavailable, match="the console has ended"):
        answering.policy()
