"""Opens this person's browser at the console, without the token in the list of processes."""

import os
import sys
import threading
import webbrowser
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

# BROWSER is what a person chose, whatever it is; without a display, Python would take a browser for terminals.
_GRAPHICAL = ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY")

_LEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Updraft</title>
<meta http-equiv="refresh" content="0; url={address}"></head>
<body><p><a href="{address}">Open the console</a></p></body></html>
"""


def has_browser(environ: Mapping[str, str]) -> bool:
    """Whether a browser with windows can be had."""
    return sys.platform == "darwin" or any(environ.get(name) for name in _GRAPHICAL)


@contextmanager
def opened(address: str) -> Iterator[None]:
    """Open the browser at an address; for the length of the block, keep the file that leads there.

    The browser's arguments can be read by every user of the machine. So it gets the name of a file that only this one reads.
    """
    if not has_browser(os.environ):
        yield
        return
    with TemporaryDirectory(prefix="updraft-console-") as folder:  # its mode is 0700
        page = Path(folder) / "open.html"
        page.touch(mode=0o600)
        page.write_text(_LEAD.format(address=escape(address)))
        threading.Thread(target=webbrowser.open, args=(page.as_uri(),), daemon=True).start()
        yield
