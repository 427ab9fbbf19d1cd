"""The pictures of the console in docs/images/console: `python -m tests.browser.screenshots`, which is `make screenshots`.

Every page in the light theme, in the dark one, and on a phone, of the same made-up fleet at the same time of day (story.py), so
that a picture changes only if a page does. With `--run`, they are of a real run on this machine (real_run.py), with its report,
in the folder `run`. With `--dashboard` there is only a picture of the panels of the chart's dashboard (dashboard.py), and with
`--report` only README's, of a report that `make demo` wrote. A picture has few colours, so that the whole set stays small.
"""

import argparse
import io
import sys
import tempfile
import time
from pathlib import Path
from typing import cast

from PIL import Image
from tests.browser import build, dashboard, real_run, story
from tests.browser.browser import DESKTOP, PHONE, Browser, Theme, running
from tests.browser.pages import DRAWN, NAMES, Pages, pages_of
from tests.chart.fleet_run import fleet_run
from tests.support.wait import wait_until

from updraft_cli.ui.observer import Pace
from updraft_cli.ui.server import serving

FOLDER = build.ROOT / "docs/images/console"
MAX_BYTES = 1_800_000
"""All pictures of a folder together."""
_REPORT = FOLDER.parent / "report.png"
_REPORT_SIZE = (1180, 690)
"""README's picture: the first chart of a report."""

_DASHBOARD = FOLDER.parent / "dashboard-fleet.png"
_DASHBOARD_S, _PAUSE_S = 150, 0.2
"""Length of the run, and the pause between two of its requests."""
_DASHBOARD_SIZE = (1800, 3480)
"""Width, and the most of its height."""

_SAME = frozenset({"confirm", "diff"})
"""Pages that look the same in a real run."""

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


def take_run(folder: Path, names: list[str], minutes: float) -> int:
    """Write the pictures of a real run and of its report; return their size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place, running(Path(place) / "profile") as browser:

        def take_all(name: str, address: str) -> None:
            for look, theme, size in _LOOKS:
                browser.show(theme, size)
                browser.driver.get(address)
                (folder / f"{name}-{look}.png").write_bytes(small(drawn(browser)))

        real_run.show(Path(place), browser, names, minutes, take_all)
    return sum(path.stat().st_size for path in folder.glob("*.png"))


def take_report(report: Path, file: Path) -> int:
    """Write README's picture of a demo's report; return its size in bytes."""
    with tempfile.TemporaryDirectory() as place, running(Path(place) / "profile") as browser:
        browser.show("light", _REPORT_SIZE)
        browser.driver.get(report.resolve().as_uri())
        file.write_bytes(small(drawn(browser, _REPORT_SIZE[1])))
    return file.stat().st_size


def take_dashboard(file: Path) -> int:
    """Write the picture of the dashboard; return its size in bytes."""
    with tempfile.TemporaryDirectory() as place, running(Path(place) / "profile") as browser:
        with fleet_run(Path(place)) as run:
            while time.time() - run.since_s < _DASHBOARD_S:
                run.send()
                time.sleep(_PAUSE_S)
            page = Path(place) / "page.html"
            page.write_text(dashboard.page(run.prometheus, run.since_s))
        browser.show("light", (_DASHBOARD_SIZE[0], DESKTOP[1]))
        browser.driver.get(page.as_uri())
        file.write_bytes(small(drawn(browser, _DASHBOARD_SIZE[1])))
    return file.stat().st_size


def picture(browser: Browser, pages: Pages, name: str) -> bytes:
    browser.open(pages[name])
    return drawn(browser)


def drawn(browser: Browser, max_height: int = _MAX_HEIGHT) -> bytes:
    browser.wait_for(DRAWN, what="all charts")
    browser.wait_for("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")
    return browser.picture(max_height=max_height)


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
    parser.add_argument("--pages", nargs="*", choices=NAMES, help="only these pages")
    parser.add_argument(
        "--run", type=float, metavar="MINUTES", help="of a real run of so many minutes, with its report"
    )
    parser.add_argument("--out", type=Path, help="the folder")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--report", type=Path, metavar="HTML", help="only README's picture, of the report of a demo")
    one.add_argument("--dashboard", action="store_true", help="only the panels of the fleet's dashboard (3 minutes)")
    arguments = parser.parse_args()
    if arguments.dashboard or arguments.report:
        if arguments.pages or arguments.run or arguments.out:
            parser.error("--dashboard and --report take one picture each: leave --pages, --run and --out out")
        file = _DASHBOARD if arguments.dashboard else _REPORT
        num_bytes = take_dashboard(file) if arguments.dashboard else take_report(arguments.report, file)
        sys.stdout.write(f"{file}: {num_bytes / 1000:,.0f} kB\n")
        return
    out = arguments.out or (FOLDER / "run" if arguments.run else FOLDER)
    names = arguments.pages or [name for name in NAMES if not (arguments.run and name in _SAME)]
    num_bytes = take_run(out, names, arguments.run) if arguments.run else take(out, names)
    sys.stdout.write(f"{out}: {num_bytes / 1000:,.0f} kB\n")
    if num_bytes > MAX_BYTES:
        sys.exit(f"The pictures take more than {MAX_BYTES / 1000:,.0f} kB; show less or use fewer colours.")


if __name__ == "__main__":
    main()
