"""`updraft tenant` against a real registry; the test is the trainer."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.cli.conftest import Run
from tests.support.checkpoints import draft
from tests.support.ports import free_port
from tests.support.processes import Process
from tests.support.registry import CALL_S, client, publish

from updraft.registry.v1 import registry_pb2 as pb

ACME, RIVAL = 2**64 - 1, 7


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A registry with versions that learned from two tenants."""
    port = free_port()
    variables = {
        "UPDRAFT_REGISTRY_PORT": str(port),
        "UPDRAFT_REGISTRY_METRICS_PORT": "0",
        "UPDRAFT_REGISTRY_STRATEGY": "Immediate",
        "UPDRAFT_REGISTRY_DATA_DIR": str(tmp_path / "data"),
    }
    with Process("updraft_registry", variables, tmp_path / "log") as process:
        process.wait_for_log("Registry serves")
        asyncio.run(_publish(f"127.0.0.1:{port}"))
        yield f"127.0.0.1:{port}"


async def _publish(address: str) -> None:
    async with client(address) as stub:
        for seed, tenants in enumerate(([RIVAL], [RIVAL, ACME], [RIVAL, ACME], [RIVAL]), start=1):
            provenance = pb.Provenance(tenants=tenants, has_more_tenants=seed == 4)
            await publish(stub, draft(seed), provenance=provenance)


async def _report(address: str, forgotten_ms: int) -> None:
    async with client(address) as stub:
        learning = pb.Learning(forgotten_unix_ms=forgotten_ms)
        request = pb.ReportTrainingRequest(speculator="default", message="trains", learning=learning)
        await stub.ReportTraining(request, timeout=CALL_S)


def test_versions_and_tenants_show_who_learned_from_whom(run: Run, address: str) -> None:
    shown = run("tenant", "list", "--registry", address).output
    assert [line.split() for line in shown.splitlines()[1:3]] == [
        ["0000000000000007", "-", "kept", "1-4"],
        ["ffffffffffffffff", "-", "kept", "2-3"],
    ]
    assert "Versions 4 may have learned from tenants that they do not list" in shown
    (one,) = json.loads(run("tenant", "list", "--hash", "f" * 16, "-o", "json", "--registry", address).output)[
        "tenants"
    ]
    assert one == {"hash": "f" * 16, "versions": [2, 3], "forgotten": None, "deleted": False}
    details = run("draft", "show", "2", "--registry", address).output
    assert "2 tenants: 0000000000000007, ffffffffffffffff" in details
    assert "1 tenant: 0000000000000007 and others" in run("draft", "show", "4", "--registry", address).output


def test_an_order_is_kept_and_shown_as_done_when_the_trainer_reports_it(run: Run, address: str) -> None:
    result = run("tenant", "forget", "--hash", "f" * 16, "--yes", "--wait", "0", "--registry", address)
    assert result.exit_code == 0
    assert "will be forgotten: the order is kept" in result.output
    assert "2 versions may have learned from it: 2-3." in result.output
    assert "knew nothing" not in result.output
    asyncio.run(_report(address, 2**47))
    (tenant,) = json.loads(run("tenant", "list", "--hash", "f" * 16, "-o", "json", "--registry", address).output)[
        "tenants"
    ]
    assert tenant["deleted"]
    assert tenant["forgotten"] is not None
    again = run("tenant", "forget", "--hash", "f" * 16, "--yes", "--registry", address)
    assert "is forgotten: its traces are deleted" in again.output
    reasons = run("draft", "history", "--registry", address).output
    assert reasons.count("tenant ffffffffffffffff is to be forgotten") == 2


def test_a_name_is_hashed_by_the_registry_and_never_stored(run: Run, address: str, tmp_path: Path) -> None:
    run("tenant", "forget", "acme-of-the-test", "--yes", "--wait", "0", "--registry", address)
    by_name = run("tenant", "list", "acme-of-the-test", "-o", "name", "--registry", address).output.strip()
    everybody = run("tenant", "list", "-o", "name", "--registry", address).output.split()

    assert len(by_name) == 16
    assert by_name in everybody
    files = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert not any(b"acme-of-the-test" in path.read_bytes() for path in files)


def test_a_name_of_sixteen_hexadecimal_digits_is_a_name_and_an_unknown_one_is_told(run: Run, address: str) -> None:
    result = run("tenant", "forget", "f" * 16, "--yes", "--wait", "0", "--registry", address)
    assert result.exit_code == 0
    assert "The registry knew nothing of this tenant: check its name." in " ".join(result.output.split())
    assert "No version lists it" in result.output
    assert "f" * 16 not in result.output, "this is the hash of another name"
    again = run("tenant", "forget", "f" * 16, "--yes", "--wait", "0", "--registry", address)
    assert "knew nothing" not in again.output


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ([], "name a tenant, or give its --hash"),
        (["acme", "--hash", "f" * 16], "give a name or a --hash, not both"),
        (["--hash", "acme"], "expected 16 hexadecimal digits"),
    ],
)
def test_an_order_names_one_tenant(run: Run, args: list[str], why: str) -> None:
    result = run("tenant", "forget", *args, "--yes", "--registry", "127.0.0.1:1")
    assert result.exit_code == 2
    assert why in result.output


def test_what_is_no_tenant_ends_in_one_sentence(run: Run, address: str) -> None:
    result = run("tenant", "forget", " ", "--yes", "--registry", address)
    assert (result.exit_code, result.output) == (
        1,
        "Error: the name of a tenant is 1 to 256 printable characters\n",
    )
