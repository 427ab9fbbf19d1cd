"""The pictures of the console in docs/images/console: `python -m tests.browser.screenshots`, which is `make screenshots`.

Every page in the light theme, in the dark one, and on a phone, of the same made-up fleet at the same time of day (story.py), so
that a picture changes only if a page does. A picture has few colours, so that the whole set stays small.
"""

import argparse
import io
import sys
import tempfile
from pathlib import Path
from typing import cast

from PIL import Image
from tests.browser import build, story
from tests.browser.browser import DESKTOP, PHONE, Browser, Theme, running
from tests.browser.pages import DRAWN, NAMES, Pages, pages_of
from tests.support.wait import wait_until

from updraft_cli.ui.observer import Pace
from updraft_cli.ui.server import serving

FOLDER = build.ROOT / "docs/images/console"
MAX_BYTES = 1_500_000
"""All pictures together."""

_COLOURS = 128
_MAX_HEIGHT = 1660
_LOOKS: tuple[tuple[str, Theme, tuple[int, int]], ...] = (
    ("light", "light", DESKTOP),
    ("dark", "dark", DESKTOP),
    ("phone", "light", PHONE),
)


def take(folder: Path, names: list[str]) -> int:
    """Write the pictures of these pages; return their size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    backend, end = story.backend(), story.last()
    pace = Pace(watched_s=0.0, idle_s=0.0)  # as fast as it can through the past
    with (
        tempfile.TemporaryDirectory() as profile,
        serving(backend, pace=pace) as console,
        running(Path(profile)) as browser,
    ):
        pages = pages_of(console.address, end)
        wait_until(lambda: backend.memory.snapshot.time == end.time, what="the end of the story")
        browser.open(pages.address)
        for look, theme, size in _LOOKS:
            browser.show(theme, size)
            for name in names:
                (folder / f"{name}-{look}.png").write_bytes(small(picture(browser, pages, name)))
    return sum(path.stat().st_size for path in folder.glob("*.png"))


def picture(browser: Browser, pages: Pages, name: str) -> bytes:
    browser.open(pages[name])
    browser.wait_for(DRAWN, what="all charts")
    browser.wait_for("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")
    return browser.picture(max_height=_MAX_HEIGHT)


def small(png: bytes) -> bytes:
    """The same picture with its most frequent colours only; a library's choice of them would tint plain areas."""
    output = io.BytesIO()
    with Image.open(io.BytesIO(png)) as image:
        picture = image.convert("RGB")
        counts = sorted(picture.getcolors(picture.width * picture.height) or [], reverse=True)
        palette = Image.new("P", (1, 1))
        palette.putpalette([part for _, colour in counts[:_COLOURS] for part in cast("tuple[int, ...]", colour)])
        picture.quantize(palette=palette, dither=Image.Dither.NONE).save(output, "PNG", optimize=True)
    return output.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pages", nargs="*", choices=NAMES, default=list(NAMES), help="only these pages")
    parser.add_argument("--out", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    num_bytes = take(arguments.out, arguments.pages)
    sys.stdout.write(f"{arguments.out}: {num_bytes / 1000:,.0f} kB\n")
    if num_bytes > MAX_BYTES:
        sys.exit(f"The pictures take more than {MAX_BYTES / 1000:,.0f} kB; show less or use fewer colours.")


if __name__ == "__main__":
    main()
