"""A browser is opened with a file that leads to the console."""

import stat
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from tests.support.wait import LONG_S

from updraft_cli.ui.browser import has_browser

ADDRESS = "http://127.0.0.1:1/?token=secret&more"

_OPEN = """
import sys, time
from pathlib import Path
from updraft_cli.ui.browser import opened
told = Path(sys.argv[1])
with opened(sys.argv[2]):
    end = time.monotonic() + 60
    while not told.exists() and time.monotonic() < end:
        time.sleep(0.01)
"""

_BROWSER = """#!/bin/sh
path="${1#file://}"
{ echo "$1"; stat -c %a "$path" "$(dirname "$path")"; cat "$path"; } > TOLD.new
mv TOLD.new TOLD
"""


def test_the_browser_gets_a_file_of_this_user_alone_instead_of_the_token(tmp_path: Path) -> None:
    told, browser = tmp_path / "told", tmp_path / "browser"
    browser.write_text(_BROWSER.replace("TOLD", str(told)))
    browser.chmod(stat.S_IRWXU)
    command = [sys.executable, "-c", _OPEN, str(told), ADDRESS]
    subprocess.run(command, check=True, env={"BROWSER": str(browser), "PATH": "/usr/bin:/bin"}, timeout=LONG_S)
    argument, mode, folder_mode, content = told.read_text().split("\n", 3)
    assert "secret" not in argument
    assert (mode, folder_mode) == ("600", "700")
    assert 'content="0; url=http://127.0.0.1:1/?token=secret&amp;more"' in content
    assert not Path(unquote(urlsplit(argument).path)).exists()


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS always has one")
@pytest.mark.parametrize(
    ("environ", "has"), [({}, False), ({"DISPLAY": ":0"}, True), ({"WAYLAND_DISPLAY": "wayland-0"}, True)]
)
def test_without_a_display_none_is_opened(environ: dict[str, str], has: bool) -> None:  # noqa: FBT001
    assert has_browser(environ) is has
