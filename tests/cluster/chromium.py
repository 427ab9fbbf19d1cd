"""A Chromium for pages of `kubectl updraft ui`; without one, tests are skipped with what to do."""

from collections.abc import Iterator

import pytest
from tests.browser import build
from tests.browser.browser import Browser, running


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if reason := build.why_missing():
        pytest.skip(reason)
    with running(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser
