"""`updraft ui` itself, on a real registry with simulated pods and many versions: its start, its first page and its memory."""

import asyncio
import http.cookiejar
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from bench.fleet.usage import allow_files
from tests.support.checkpoints import TARGET, draft
from tests.support.registry import RegistryProcess, client, publish
from tests.support.sim_pods import Behaviour, pods
from tests.support.wait import LONG_S, until

from updraft_cli.ui.observer import PACE

_PAGES = ("/", "/s/default/fleet", "/s/default/versions", "/s/default/history")
_ROUNDS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandCost:
    start_s: float
    """Until it prints its address."""
    first_page_s: float
    """The overview, as it is asked for at once."""
    memory_mb: float
    """Resident, after a minute in which all pages were asked for again and again."""


def measure(folder: Path, num_pods: int, num_versions: int) -> CommandCost:
    """Start all of it in a folder, and end it."""
    allow_files(num_pods)
    settings = {"strategy": "Manual", "revision_history_limit": num_versions}
    with RegistryProcess(folder, **settings) as registry:
        return asyncio.run(_measure(registry, num_pods, num_versions))


async def _measure(registry: RegistryProcess, num_pods: int, num_versions: int) -> CommandCost:
    async with client(registry.address) as stub:
        for seed in range(num_versions):
            await publish(stub, draft(seed))
    behaviour = Behaviour(target=TARGET, report_s=10.0, requests_per_s=1.0)
    async with pods(registry.address, num_pods, behaviour) as fleet:
        await until(lambda: all(pod.is_connected for pod in fleet), timeout_s=LONG_S + num_pods / 5, what="all pods")
        return await asyncio.to_thread(_ask, registry.address)


def _ask(address: str) -> CommandCost:
    started = time.monotonic()
    with _running(address) as (process, console):
        start_s = time.monotonic() - started
        browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar()))
        started = time.monotonic()
        browser.open(console, timeout=LONG_S).read()  # takes the token out of the address
        browser.open(console.partition("/?")[0], timeout=LONG_S).read()
        first_page_s = time.monotonic() - started
        for _ in range(_ROUNDS):
            for page in _PAGES:
                browser.open(console.partition("/?")[0] + page, timeout=LONG_S).read()
            time.sleep(PACE.fresh_s + 1.0)
        return CommandCost(
            start_s=start_s, first_page_s=first_page_s, memory_mb=psutil.Process(process.pid).memory_info().rss / 1e6
        )


@contextmanager
def _running(address: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """The command, and the address that it prints."""
    command = [sys.executable, "-m", "updraft_cli", "ui", "--no-browser", "--port", "0", "--registry", address]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("UPDRAFT_")}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environ
    ) as process:
        assert process.stdout is not None
        try:
            yield process, next(word for line in process.stdout for word in line.split() if "token=" in word)
        finally:
            process.terminate()
            process.wait(LONG_S)
