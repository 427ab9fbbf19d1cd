"""A way to a registry opens in the background, is told why it does not, and is tried again, but not by people who may not."""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.api_server import ApiServer, api_server
from tests.support.wait import wait_until

from updraft_chassis.errors import Unauthenticated, Unavailable
from updraft_cli.backends.cluster_client import KubeContext
from updraft_cli.backends.forwarded import tunnels as module
from updraft_cli.backends.forwarded.tunnels import Tunnel, tunnels

OPENS = """#!/bin/sh
echo started >> "$0.log"
echo "Forwarding from 127.0.0.1:4242 -> 50051"
exec sleep 600
"""
FAILS = """#!/bin/sh
echo started >> "$0.log"
echo 'error: pods "qwen-registry-0" not found' >&2
exit 1
"""
LEAVES_WITH_ANOTHER = """#!/bin/sh
trap 'echo asked $$ >> "$0.log"' TERM
echo "Forwarding from 127.0.0.1:4242 -> 50051"
until [ "$(sort -u "$0.log" | grep -c asked)" -ge 2 ]; do sleep 0.05; done
echo left >> "$0.log"
"""


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in kubectl's place; it notes each start in a log beside it."""
    file = tmp_path / "bin" / "kubectl"
    file.parent.mkdir()
    install(file, OPENS)
    monkeypatch.setenv("PATH", f"{file.parent}{os.pathsep}{os.environ['PATH']}")
    return file


def install(file: Path, script: str) -> None:
    new = file.with_suffix(".new")
    new.write_text(script)
    new.chmod(0o755)
    new.replace(file)


def num_starts(file: Path) -> int:
    log = Path(f"{file}.log")
    return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.fixture
def api(tmp_path: Path) -> Iterator[ApiServer]:
    with api_server(tmp_path) as server:
        yield server


@pytest.fixture
def tunnel(api: ApiServer, kubectl: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tunnel]:
    """One that tries again at once, unless it is refused."""
    monkeypatch.setattr(module, "_RETRY_S", 0.0)
    with tunnels(KubeContext(kubeconfig=api.kubeconfig)) as opened:
        yield opened.to("team", "qwen")


def opened(tunnel: Tunnel) -> None:
    wait_until(lambda: tunnel.registry() is not None, what="the way to the registry")


def test_it_opens_with_a_token_of_the_speculator(tunnel: Tunnel, api: ApiServer) -> None:
    opened(tunnel)
    registry = tunnel.registry()
    assert registry is not None
    assert (registry.address, tunnel.problem, api.tokens) == ("127.0.0.1:4242", "", ["qwen"])
    token_file = registry.credentials.token_file
    assert token_file is not None
    assert token_file.read_text() == "token-1"
    assert token_file.stat().st_mode & 0o077 == 0
    assert (registry.credentials.ca_file, registry.credentials.server_name) == (None, "")


def test_it_trusts_the_cas_of_a_registry_that_speaks_tls(tunnel: Tunnel, api: ApiServer) -> None:
    api.authorities["qwen-ca"] = "PEM"
    opened(tunnel)
    registry = tunnel.registry()
    assert registry is not None
    assert registry.credentials.server_name == "qwen-registry.team.svc"
    assert registry.credentials.ca_file is not None
    assert registry.credentials.ca_file.read_text() == "PEM"


def test_what_kubectl_says_stays_until_there_is_a_way(tunnel: Tunnel, kubectl: Path) -> None:
    install(kubectl, FAILS)
    why = 'error: pods "qwen-registry-0" not found'
    wait_until(lambda: tunnel.registry() is None and tunnel.problem == why, what="kubectl's message")
    for _ in range(20):
        assert tunnel.registry() is None
        assert tunnel.problem
    install(kubectl, OPENS)
    opened(tunnel)
    assert tunnel.problem == ""


def test_a_way_on_which_nobody_answers_is_opened_again(tunnel: Tunnel, kubectl: Path) -> None:
    opened(tunnel)
    tunnel.failed(Unavailable("no registry answers"))
    assert tunnel.problem == "no registry answers"
    opened(tunnel)
    assert num_starts(kubectl) == 2


def test_a_registry_that_takes_connections_and_says_nothing_is_soon_unavailable(
    tunnel: Tunnel, kubectl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        install(kubectl, OPENS.replace("4242", str(silent.getsockname()[1])))
        opened(tunnel)
        registry = tunnel.registry()
        assert registry is not None
        with pytest.raises(Unavailable, match=r"does not answer within 0\.2 s"):
            next(registry.snapshots())


def test_a_token_that_is_not_accepted_or_expires_soon_is_renewed(tunnel: Tunnel, api: ApiServer) -> None:
    opened(tunnel)
    assert len(api.tokens) == 1
    api.token_life_s = -1.0
    tunnel.failed(Unauthenticated("it has expired"))
    opened(tunnel)
    num_before = len(api.tokens)
    assert num_before > 1
    opened(tunnel)
    assert len(api.tokens) > num_before, "the last one was expired when it came"


def test_a_closed_console_opens_no_way_any_more(api: ApiServer, kubectl: Path) -> None:
    with tunnels(KubeContext(kubeconfig=api.kubeconfig)) as ways:
        opened(ways.to("team", "qwen"))
    late = ways.to("team", "gemma")
    assert late.registry() is None
    assert late.problem == "the console has ended"
    assert num_starts(kubectl) == 1


def test_all_ways_are_closed_at_the_same_time(api: ApiServer, kubectl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STOP_S", 20.0)
    install(kubectl, LEAVES_WITH_ANOTHER)
    with tunnels(KubeContext(kubeconfig=api.kubeconfig)) as ways:
        for name in ("qwen", "gemma"):
            opened(ways.to("team", name))
    assert Path(f"{kubectl}.log").read_text().splitlines().count("left") == 2


def test_a_laptop_that_slept_renews_its_token(tunnel: Tunnel, api: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(tunnel)
    now_s = time.time()
    monkeypatch.setattr(time, "time", lambda: now_s + 3000.0)
    opened(tunnel)
    assert len(api.tokens) == 2


def test_who_may_not_is_not_asked_for_again_and_again(tunnel: Tunnel, api: ApiServer, kubectl: Path) -> None:
    api.is_reader = True
    for _ in range(20):
        assert tunnel.registry() is None
        assert tunnel.problem == 'serviceaccounts "qwen" is forbidden'
    assert (len(api.tokens), num_starts(kubectl)) == (1, 0)
