"""The console over HTTP, on a state from memory: how fresh its pages are, what they ask for, and how it ends."""

import threading
from collections.abc import Iterator

import pytest
from tests.support.console import Browser, MemoryBackend, memory_backend, state, text_of
from tests.support.wait import LONG_S, wait_until

from updraft_cli.ui.observer import Pace
from updraft_cli.ui.server import serving


@pytest.fixture
def backend() -> MemoryBackend:
    return memory_backend(state())


@pytest.fixture
def browser(backend: MemoryBackend) -> Iterator[Browser]:
    with serving(backend, pace=Pace(watched_s=0.2, patience_s=LONG_S)) as console, Browser(console.address) as visitor:
        yield visitor


def test_every_page_says_how_old_it_is_and_goes_on_saying_so(browser: Browser) -> None:
    assert "As of 12:" in browser.text("/s/qwen/versions/2")
    ages = (data for name, data in browser.events("version", "qwen", "2") if name == "live-age")
    assert text_of(next(ages)) != text_of(next(ages))


def test_a_page_whose_backend_hangs_says_that_it_is_old(browser: Browser, backend: MemoryBackend) -> None:
    events = browser.events("overview")
    next(events)
    backend.memory.hold = threading.Event()
    try:
        notice = next(data for name, data in events if name == "live-notice" and data)
    finally:
        backend.memory.hold.set()
    assert "The backend is slow: this page shows its state as of 12:" in notice


def test_an_open_page_that_does_not_follow_its_version_asks_for_it_once(
    browser: Browser, backend: MemoryBackend
) -> None:
    browser.page("/s/qwen/versions/2")
    events = browser.events("version", "qwen", "2")
    for _ in range(3):
        next(data for name, data in events if name == "series")
    assert backend.memory.calls == ["draft 2"]


def test_an_address_of_a_pod_without_a_name_is_not_found(browser: Browser) -> None:
    missing = browser.http.get("/s/qwen/fleet/")
    assert missing.status_code == 404
    assert "An address of a pod ends with its name." in missing.text
    notice = next(data for name, data in browser.events("pod", "qwen") if name == "live-notice")
    assert "An address of a pod ends with its name." in notice


def test_a_console_ends_while_its_backend_hangs(backend: MemoryBackend) -> None:
    hold = threading.Event()
    try:
        with serving(backend, pace=Pace(watched_s=0.2)) as console, Browser(console.address) as browser:
            next(browser.events("overview"))
            backend.memory.hold = hold
            wait_until(lambda: "The backend is slow" in browser.text("/"), what="a read that hangs")
        wait_until(lambda: "console" not in {thread.name for thread in threading.enumerate()}, what="the server's end")
    finally:
        hold.set()
