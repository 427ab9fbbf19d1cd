"""Builds the documentation site into site/html: `python -m tools.docsite`. With `serve`, shows it while pages change.

Runs in an environment of its own (`make docs`), so it imports nothing but the standard library. Any warning of Zensical is an
error, and so is a page that would load something from another host.
"""

import contextlib
import re
import subprocess
import sys
import time
from pathlib import Path

from tools.docsite.stage import BrokenLinkError, stage

CHECKOUT = Path(__file__).parents[2]
SITE = CHECKOUT / "site"
ZENSICAL = Path(sys.executable).with_name("zensical")

_LIMIT_S = 300
"""A build takes 10 s on a machine with nothing else to do."""

_LOADED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(?:https?:)?//|<link\b[^>]*\bhref=["']?(?:https?:)?//"""
)


def main() -> None:
    """Build the site, or serve it on 127.0.0.1:8765; exit with 1 and a sentence if a page is wrong."""
    try:
        num_files = stage(CHECKOUT, SITE)
        if sys.argv[1:] == ["serve"]:
            _serve()
            return
    except (BrokenLinkError, FileNotFoundError) as error:
        sys.exit(str(error))
    command = [str(ZENSICAL), "build", "--clean", "--strict"]
    try:
        build = subprocess.run(command, cwd=SITE, stderr=subprocess.PIPE, text=True, check=False, timeout=_LIMIT_S)  # noqa: S603
    except subprocess.TimeoutExpired:
        sys.exit(f"Zensical did not build the site within {_LIMIT_S} seconds.")
    print(build.stderr.partition("Traceback")[0], end="")  # a warning ends the build by an exception
    if build.returncode != 0:
        sys.exit("The site was not built; the reasons are above. Lines are those of site/pages.")
    if remote := pages_that_load_from_another_host(SITE / "html"):
        sys.exit(f"These pages load something from another host: {', '.join(remote)}")
    print(f"{num_files} files in {SITE / 'html'}; `make docs-serve` shows them.")


def pages_that_load_from_another_host(html: Path) -> list[str]:
    """Names of pages with a script, style sheet, picture or frame that is not on the site."""
    pages = sorted(html.rglob("*.html"))
    return [str(page.relative_to(html)) for page in pages if _LOADED.search(page.read_text(encoding="utf-8"))]


def _serve() -> None:
    """Show the site and follow changes of the pages, until Ctrl-C."""
    with contextlib.suppress(KeyboardInterrupt), subprocess.Popen([ZENSICAL, "serve"], cwd=SITE) as preview:  # noqa: S603
        while preview.poll() is None:
            time.sleep(1)
            try:
                stage(CHECKOUT, SITE)
            except (BrokenLinkError, FileNotFoundError) as error:
                print(error, flush=True)


if __name__ == "__main__":
    main()
