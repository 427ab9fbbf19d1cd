"""The console on a real registry: pages of what it holds, decisions by form, and updates as they happen."""

import asyncio
import itertools
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.cli.conftest import Run
from tests.support import checkpoints
from tests.support.console import Browser, Form, text_of
from tests.support.ports import free_port
from tests.support.registry import PodStream, RegistryProcess, client, publish, state
from tests.support.wait import LONG_S, wait_until

from updraft.registry.v1 import registry_pb2 as pb
from updraft_chassis import rpc
from updraft_chassis.credentials import Credentials
from updraft_cli.backends.installation import Installation
from updraft_cli.backends.registry import RegistryBackend
from updraft_cli.ui.observer import Pace
from updraft_cli.ui.server import serving

_numbers = itertools.count()

PATIENT = Pace(patience_s=LONG_S)
"""Pages wait for a new state after a decision, however busy this machine is."""


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryProcess]:
    """A registry without pods that promotes what passes its gate."""
    with RegistryProcess(tmp_path_factory.mktemp("registry")) as process:
        yield process


@pytest.fixture
def name(registry: RegistryProcess) -> str:
    """A speculator of the test's own: version 2 won, version 3 waits for a person."""
    name = f"speculator-{next(_numbers)}"
    asyncio.run(_publish(registry.address, name))
    return name


@pytest.fixture
def browser(registry: RegistryProcess, name: str) -> Iterator[Browser]:
    with serving(backend(registry.address, name), pace=PATIENT) as console, Browser(console.address) as visitor:
        yield visitor


def backend(address: str, name: str) -> RegistryBackend:
    nothing = Installation(processes=(), speculators=None)
    return RegistryBackend(
        address=address, speculator=name, is_one=True, credentials=Credentials(), local=lambda: nothing
    )


async def _publish(address: str, name: str) -> None:
    async with client(address) as stub:
        for number, gain in ((1, 2.0), (2, 1.5)):
            fields = {"speculator": name, "evaluation": checkpoints.evaluation(baseline=number - 1, gain=gain)}
            await publish(stub, checkpoints.draft(number), source=pb.SOURCE_TRAINER, **fields)
        await publish(stub, checkpoints.draft(3), speculator=name)


def now(registry: RegistryProcess, name: str) -> pb.SpeculatorState:
    async def ask() -> pb.SpeculatorState:
        async with client(registry.address) as stub:
            return await state(stub, name)

    return asyncio.run(ask())


def test_every_page_shows_what_the_registry_holds(browser: Browser, name: str) -> None:
    assert f"{name} serving a draft Version 2 is stable" in browser.text("/")
    assert "stable version 2" in browser.text(f"/s/{name}/rollout")
    listed = browser.text(f"/s/{name}/versions")
    assert all(phase in listed for phase in ("held", "stable", "superseded"))
    one = browser.text(f"/s/{name}/versions/2")
    assert "Offline evidence this version" in one
    assert "fc.weight" in one
    assert "2 of 4 tensors differ." in browser.text(f"/s/{name}/versions/1/diff/2")
    assert "No trainer reports numbers here." in browser.text(f"/s/{name}/learning")
    assert "No pod is known." in browser.text(f"/s/{name}/fleet")
    assert "No verify step counts yet." in browser.text(f"/s/{name}/traffic")
    history = browser.text(f"/s/{name}/history")
    assert "superseded stable gate version 2 took over" in history, history


def test_a_pin_by_form_is_the_registrys_pin_with_its_reason(
    browser: Browser, registry: RegistryProcess, name: str
) -> None:
    assert "All pods load version 1 now" in browser.text(f"/s/{name}/confirm/pin?version=1")
    answer = browser.decide(f"/s/{name}/confirm/pin?version=1", reason="slow answers since noon")
    assert (answer.status_code, answer.headers["location"]) == (303, f"/s/{name}/history")
    pinned = now(registry, name)
    assert (pinned.pinned, pinned.stable, pinned.pin_reason) == (1, 1, "slow answers since noon")
    shown = browser.text(f"/s/{name}/history")
    assert f"Version 1 is pinned for {name}" in shown
    assert "slow answers since noon" in shown
    assert f"Version 1 is pinned for {name}" not in browser.text(f"/s/{name}/history")  # said once

    assert browser.decide(f"/s/{name}/confirm/unpin").status_code == 303
    assert not now(registry, name).HasField("pinned")


def test_roll_back_pins_the_version_that_served_before(browser: Browser, registry: RegistryProcess, name: str) -> None:
    history = browser.page(f"/s/{name}/history")
    assert "Roll back to version 1" in history
    link = history.partition("Roll back to version 1")[0].rpartition('href="')[2].partition('"')[0]
    assert browser.decide(link).status_code == 303
    assert now(registry, name).pinned == 1


def test_a_choice_of_versions_to_promote_has_only_those_that_wait(
    browser: Browser, registry: RegistryProcess, name: str
) -> None:
    form = Form.of(browser.page(f"/s/{name}/confirm/promote"))
    assert form.choices == ["3"]
    assert browser.decide(f"/s/{name}/confirm/promote", reason="measured elsewhere").status_code == 303
    assert now(registry, name).stable == 3


def test_pause_and_resume_are_the_registrys(browser: Browser, registry: RegistryProcess, name: str) -> None:
    assert browser.decide(f"/s/{name}/confirm/pause").status_code == 303
    assert now(registry, name).paused
    assert "The rollout is paused." in browser.text(f"/s/{name}/rollout")
    assert browser.decide(f"/s/{name}/confirm/resume").status_code == 303
    assert not now(registry, name).paused


def test_what_the_registry_refuses_is_shown_as_its_sentence(
    browser: Browser, registry: RegistryProcess, name: str
) -> None:
    async def reject() -> None:
        async with client(registry.address) as stub:
            await stub.Reject(pb.RejectRequest(speculator=name, version=3, reason="bad"))

    asyncio.run(reject())
    form = Form.of(browser.page(f"/s/{name}/confirm/pin?version=2"))
    sent = {**form.fields, "version": "3"}
    refused = browser.http.post(form.action, data=sent, headers={"Origin": browser.origin})
    assert refused.status_code == 409
    assert "never serves again: rejected: bad" in text_of(refused.text)
    assert not now(registry, name).HasField("pinned")
    wait_until(
        lambda: "version 3 is rejected and never serves again" in browser.text(f"/s/{name}/confirm/pin?version=3"),
        what="the page that knows of the rejection",
    )


def test_a_decision_made_elsewhere_comes_as_an_event(
    browser: Browser, registry: RegistryProcess, name: str, run: Run
) -> None:
    events = browser.events("history", name)
    assert "pinned" not in next(data for event, data in events if event == "live-history")
    pinned = run("draft", "pin", "1", "--reason", "by hand", "--registry", registry.address, "--speculator", name)
    assert pinned.exit_code == 0
    assert "by hand" in next(data for event, data in events if event == "live-history")


async def test_pods_are_shown_as_they_report(registry: RegistryProcess, name: str) -> None:
    async with rpc.channel(registry.address) as channel:
        pod = PodStream(channel, "serving-<b>1")
        pod.identity.speculator = name
        await pod.report(running_requests=3, device="cuda:0")
        directive = await pod.receive_version(2)
        assert directive.serve_version == 2

        def look() -> tuple[str, str]:
            with serving(backend(registry.address, name)) as console, Browser(console.address) as browser:
                wait_until(lambda: "serving-<b>1" in browser.text(f"/s/{name}/fleet"), what="the pod")
                return browser.text(f"/s/{name}/fleet"), browser.text(f"/s/{name}/fleet/serving-<b>1")

        fleet, shown = await asyncio.to_thread(look)
        pod.cancel()
    assert "no draft: 1 pod" in fleet
    assert "engine test/1" in shown
    assert "device cuda:0" in shown
    assert "running requests 3" in shown


def test_an_outage_is_told_and_the_last_state_stays(tmp_path: Path) -> None:
    with RegistryProcess(tmp_path) as registry:
        asyncio.run(_publish(registry.address, "default"))
        with serving(backend(registry.address, "default")) as console, Browser(console.address) as browser:
            events = browser.events("versions", "default")
            next(data for event, data in events if event == "live-versions")
            registry.kill()
            assert "This page shows the last known state" in next(d for e, d in events if e == "live-notice" and d)
            assert "superseded" in browser.text("/s/default/versions")
            registry.start()
            next(data for event, data in events if event == "live-notice" and not data.strip())


def test_without_a_registry_the_command_ends_with_one_sentence(run: Run) -> None:
    ended = run("ui", "--no-browser", "--registry", f"127.0.0.1:{free_port()}")
    assert ended.exit_code == 1
    assert ended.output.startswith("Error: no registry answers at 127.0.0.1:")


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_command_serves_on_its_port_until_it_is_ended(
    registry: RegistryProcess, name: str, end: signal.Signals
) -> None:
    if signal.getsignal(end) is signal.SIG_IGN:
        pytest.skip("these tests run under nohup, whose commands ignore the end of a terminal")
    port = free_port()
    options = ["--no-browser", "--port", str(port), "--registry", registry.address]
    command = [sys.executable, "-m", "updraft_cli", "ui", name, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address.startswith(f"http://127.0.0.1:{port}/?token=")
        with Browser(address) as browser:
            assert name in browser.text("/")
        process.send_signal(end)
        _, err = process.communicate(timeout=LONG_S)
    assert (process.returncode, err.splitlines()[0]) == (0, "The console runs until Ctrl-C.")


def test_a_port_that_is_taken_is_one_sentence(registry: RegistryProcess, name: str, run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = run("ui", name, "--no-browser", "--port", port, "--registry", registry.address)
    assert ended.exit_code == 1
    assert ended.output == f"Error: cannot use port {port}: Address already in use; choose another one with --port\n"
