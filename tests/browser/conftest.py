"""One Chromium for all tests of a worker. Where none can be had, tests are skipped with what to do."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.browser import build
from tests.browser.browser import Browser, running
from tests.browser.pages import Pages, pages_of
from tests.support.console import MemoryBackend, memory_backend, state

from updraft_cli.ui.server import serving

_HERE = Path(__file__).parent
_SESSION_S = 300
"""For a test that opens a dozen pages on a machine that others use too."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = build.why_missing()
    for item in items:
        if _HERE not in item.path.parents:
            continue
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(_SESSION_S))
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with running(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """A window of the usual size in the light theme, without cookies. After the test no page may have logged an error."""
    chromium.leave()
    chromium.console()
    chromium.forget()
    chromium.show()
    yield chromium
    assert chromium.console() == []


@pytest.fixture
def backend() -> MemoryBackend:
    """A small fleet with a canary."""
    return memory_backend(state(num_pods=24, num_versions=12))


@pytest.fixture
def pages(browser: Browser, backend: MemoryBackend) -> Iterator[Pages]:
    """The console of that fleet. The browser leaves it before it ends, because it would log that the stream breaks off."""
    with serving(backend) as console:
        yield pages_of(console.address, backend.memory.snapshot)
        browser.leave()
