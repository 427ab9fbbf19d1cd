"""torch's own rendezvous in processes of their own, as SGLang and vLLM open it."""

import json
import os
import subprocess
import sys
from importlib import import_module

import pytest
from tests.support.ports import free_port

from updraft_tap.ports import rendezvous

_JOIN = """
import json, os, sys
import psutil, torch
from torch import distributed
from updraft_tap.ports import rendezvous

place, is_kept, (rank, num_ranks) = sys.argv[1], sys.argv[2] == "kept", map(int, sys.argv[3:])
if is_kept:
    assert rendezvous.keep_local(lambda: os.environ["NODES"] == "1") == ""
    distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    distributed.destroy_process_group()
for _ in range(2):
    distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=num_ranks)
    total = torch.ones(1)
    distributed.all_reduce(total)
    distributed.barrier()
    listening = {each.laddr.ip for each in psutil.Process().net_connections("inet") if each.status == "LISTEN"}
    if num_ranks > 1:
        break
    distributed.destroy_process_group()
print(json.dumps([total.item(), sorted(listening), os.environ.get("GLOO_SOCKET_IFNAME")]))
"""


def joined(
    num_ranks: int = 1, *, is_kept: bool, place: str = "tcp://127.0.0.1:{}", num_nodes: str = "1"
) -> list[tuple[float, list[str], str | None]]:
    """By rank, the sum over the ranks, the addresses on which it listens, and the network interface of gloo."""
    place = place.format(free_port())
    ours = ("TORCHELASTIC", "GLOO")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    if num_nodes != "unknown":
        environment["NODES"] = num_nodes
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _JOIN, place, "kept" if is_kept else "by torch", str(rank), str(num_ranks)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(num_ranks)
    ]
    answers = [process.communicate()[0] for process in processes]
    return [(total, addresses, interface) for total, addresses, interface in map(json.loads, answers)]


@pytest.mark.attack(
    boundary="plugin",
    attack="writing to the rendezvous of torch, which asks for no key, in a server of one rank",
    outcome="it listens inside the pod only",
)
def test_the_rendezvous_of_one_rank_is_reached_from_this_machine_only() -> None:
    ((total, addresses, interface),) = joined(is_kept=True)
    assert total == 1
    assert set(addresses) <= {"127.0.0.1"}
    assert interface == "lo", "else gloo takes the address of the host's name, which is that of a pod"
    ((_, by_torch, _),) = joined(is_kept=False)
    assert not set(by_torch) <= {"127.0.0.1", "::1"}, "the hook would not be needed"


@pytest.mark.attack(
    boundary="plugin",
    attack="writing to the rendezvous of torch, which asks for no key, in a server of several ranks on one node",
    outcome="it listens inside the pod only",
)
@pytest.mark.parametrize("place", ["tcp://127.0.0.1:{}", "tcp://localhost:{}", "tcp://0.0.0.0:{}"])
def test_ranks_that_meet_on_this_machine_are_reached_from_here_only(place: str) -> None:
    for total, addresses, interface in joined(2, is_kept=True, place=place):
        assert total == 2
        assert set(addresses) <= {"127.0.0.1"}
        assert interface == "lo", "else gloo takes the address of the host's name, which is that of a pod"


def test_without_the_hooks_ranks_that_meet_on_this_machine_are_reached_from_others() -> None:
    (_, by_torch, _), _ = joined(2, is_kept=False)
    assert not set(by_torch) <= {"127.0.0.1", "::1"}


@pytest.mark.parametrize(("place", "num_nodes"), [("127.0.0.2", "1"), ("localhost", "2"), ("localhost", "unknown")])
def test_ranks_that_may_meet_elsewhere_do_as_without_the_hook_also_in_a_process_that_was_one_rank_before(
    place: str, num_nodes: str
) -> None:
    """torch listens at all addresses of this machine."""
    found = joined(2, is_kept=True, place=f"tcp://{place}:{{}}", num_nodes=num_nodes)
    assert [(total, interface) for total, _, interface in found] == [(2, None), (2, None)]


def test_a_torch_of_another_shape_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def later(options: object) -> object:
        return options

    monkeypatch.setattr(import_module("torch.distributed.rendezvous"), "_create_c10d_store", later)
    assert "expected hostname, port" in rendezvous.keep_local()
    assert "cannot keep torch's rendezvous from the network" in caplog.text
