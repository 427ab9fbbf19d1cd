"""Pictures of a real run: `updraft demo` with its real model, traffic and drafts, and at its end its report."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.browser.browser import Browser
from tests.browser.local import console
from tests.browser.pages import DRAWN, Pages
from tests.support.wait import LONG_S, wait_until

from updraft_cli.local.plan import SPECULATOR

_CANARY_SHARE, _SHARE = 0.45, 0.85
"""Shares of the run. After the first, new versions are tried in a canary until the page Rollout was shown with one. After the
second, the other pages are shown: the traffic has shifted and come back, and time is left."""

_CANARY = (
    "--strategy=canary",
    "--step=100:30s",
    "--interval=15s",
    "--switchback=5s",
    "--min-samples=30",
    "--deadline=5m",
)
_HAS_EVIDENCE = "document.querySelector('#live-rollout .interval-figure')"
"""JavaScript: whether the page Rollout shows a canary with a confidence interval."""

Show = Callable[[str, str], None]
"""Takes pictures of a page in all looks: its name, and its address."""


@contextmanager
def demo(folder: Path, minutes: float) -> Iterator[tuple[Path, Path]]:
    """A run of so many minutes, which ends by itself; yields the data of its stack and where its report will be."""
    command = [sys.executable, "-m", "updraft_cli", "demo", f"--minutes={minutes}"]
    where = (f"--out={folder / 'report'}", f"--data={folder / 'data'}")
    with subprocess.Popen([*command, *where], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if "Watch it live" in line:
                    break
            yield folder / "data" / "stack", folder / "report" / "report.html"
            process.communicate(timeout=600)
        finally:
            process.kill()


def show(folder: Path, browser: Browser, names: list[str], minutes: float, picture: Show) -> None:
    """Take pictures of these pages in a run, and then of its report."""
    with demo(folder, minutes) as (data, report):
        begun_s = time.monotonic()

        def wait(share: float) -> None:
            wait_until(
                lambda: time.monotonic() - begun_s > 60 * share * minutes, timeout_s=3600, what="this part of the run"
            )

        with console(data) as address:
            browser.open(address)  # while somebody looks, charts have a point for each second
            wait(_CANARY_SHARE)
            if "rollout" in names:
                with _canary(data):
                    browser.open(_pages(browser, address)["rollout"])
                    with suppress(TimeoutError):  # on a busy machine, no version may come; then the page shows that
                        browser.wait_for(_HAS_EVIDENCE, timeout_s=60 * minutes * (_SHARE - _CANARY_SHARE))
                    picture("rollout", browser.driver.current_url)
            wait(_SHARE)
            pages = _pages(browser, address)
            for name in filter(lambda name: name != "rollout", names):
                picture(name, pages[name])
            browser.leave()
    browser.driver.get(report.as_uri())
    browser.wait_for(DRAWN, what="all charts", timeout_s=LONG_S)
    picture("report", report.as_uri())


@contextmanager
def _canary(data: Path) -> Iterator[None]:
    """Try new versions in a canary instead of serving them at once."""
    command = [sys.executable, "-m", "updraft_cli", "rollout", "policy", "set", f"--data={data}"]
    subprocess.run([*command, *_CANARY], check=True, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        subprocess.run([*command, "--strategy=immediate"], check=True, stdout=subprocess.DEVNULL)


def _pages(browser: Browser, address: str) -> Pages:
    origin = address.partition("/?")[0]
    browser.open(f"{origin}/s/{SPECULATOR}/fleet")
    pod = browser.run("return document.querySelector('a.pod').getAttribute('href').split('/').pop()")
    browser.open(f"{origin}/s/{SPECULATOR}/versions")
    version = browser.text("#live-versions tbody a")
    return Pages(address=address, name=SPECULATOR, version=int(version), pod=pod)
