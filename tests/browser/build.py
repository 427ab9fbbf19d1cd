"""Installs what the tests of the console need: `python -m tests.browser.build`, which is `make browser`.

With `--for-tests`, as in `make test-browser`, it leaves Debian's packages to a person unless CI or UPDRAFT_BROWSER_INSTALL is
set, and ends well whatever fails: tests are then skipped. So no test run needs the network.

Chromium and its driver are Debian's packages, installed if they are missing and this is root on Debian. Selenium and axe-core
go into the cache, one folder for each content of their locks; it is complete once it holds the file `ready`. They are not
among the pins of constraints.txt, because everybody would download those again.
"""

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "requirements/browser.lock"
"""`make lock` writes it from requirements.txt."""
PACKAGE = ROOT / "cli"
"""package.json and its lock: the console's libraries, and axe-core for tests."""
LIBRARY = ROOT / "cli/updraft_cli/ui/static/vendor/htmx.min.js"
"""One of those that the installation of this checkout vendors."""
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "updraft"

ALLOWED_BY = ("CI", "UPDRAFT_BROWSER_INSTALL")
"""Either of these variables lets a run of tests install Debian's packages."""
DEBIAN_PACKAGES = ("chromium", "chromium-driver", "fonts-inter")
PROGRAMS = ("chromium", "chromedriver")

_APT_S = 240
_LIMIT_S = 120
_STOPPED = (124, 137)
"""How `timeout` ends if the command did not end in time: at its first signal, or only when it was killed."""


class BuildError(Exception):
    """Something cannot be had; the message says what and why."""


def folder() -> Path:
    """The folder with Selenium and axe-core."""
    digest = hashlib.sha256(sys.version.encode())
    for path in (REQUIREMENTS, PACKAGE / "package-lock.json"):
        digest.update(path.read_bytes())
    return CACHE / f"browser-{digest.hexdigest()[:16]}"


def python_packages() -> Path:
    return folder() / "python"


def axe() -> Path:
    """The script that finds what people with disabilities cannot use."""
    return folder() / "node_modules" / "axe-core" / "axe.min.js"


def why_missing() -> str:
    """Why tests cannot run in a browser; empty if they can."""
    if missing := [program for program in PROGRAMS if shutil.which(program) is None]:
        return f"{' and '.join(missing)} not found; run `make browser`, or install Debian's {' '.join(DEBIAN_PACKAGES)}"
    if not (folder() / "ready").exists():
        return "Selenium and axe-core are not installed; run `make browser`"
    return "" if LIBRARY.exists() else "the console has no libraries from npm; with npm, run `make install` again"


def build(tell: Callable[[str], None], *, may_use_apt: bool = True) -> None:
    """Install what is missing. Raises BuildError."""
    CACHE.mkdir(parents=True, exist_ok=True)
    target = folder()
    with target.with_name(f"{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _install_chromium(tell, may_use_apt=may_use_apt)
        if not (target / "ready").exists():
            tell(f"Installing Selenium and axe-core into {target} (once; 40 MB) ...")
            shutil.rmtree(target, ignore_errors=True)  # of a build that was interrupted
            target.mkdir()
            _install_selenium()
            _install_axe(target)
            (target / "ready").touch()


def run(*command: str, limit_s: int = _LIMIT_S, cwd: Path | None = None, environ: dict[str, str] | None = None) -> None:
    """Run a command, and end it and all that it started at its limit. Raises BuildError if it fails."""
    limited = ("timeout", "--kill-after=10", str(limit_s), *command)
    result = subprocess.run(limited, cwd=cwd, env=environ, capture_output=True, text=True, check=False)
    if result.returncode in _STOPPED:
        raise BuildError(f"`{' '.join(command)}` did not end within {limit_s} seconds")
    if result.returncode != 0:
        raise BuildError(f"`{' '.join(command)}` failed: {(result.stderr or result.stdout).strip()[-2000:]}")


def _install_chromium(tell: Callable[[str], None], *, may_use_apt: bool) -> None:
    if all(map(shutil.which, PROGRAMS)):
        return
    packages = " ".join(DEBIAN_PACKAGES)
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise BuildError(f"Chromium and its driver are missing; as root on Debian: apt-get install {packages}")
    if not may_use_apt:
        raise BuildError("Chromium and its driver are missing; `make browser` installs them (about 350 MB)")
    tell(f"Installing Debian's {packages} (once; about 350 MB) ...")
    apt = (
        "apt-get",
        "-qq",
        "-o",
        "Acquire::http::Timeout=20",
        "-o",
        "Acquire::Retries=1",
        "-o",
        "DPkg::Lock::Timeout=120",
    )
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    run(*apt, "update", limit_s=_APT_S, environ=environ)
    run(*apt, "install", "--yes", "--no-install-recommends", *DEBIAN_PACKAGES, limit_s=_APT_S, environ=environ)


def _install_selenium() -> None:
    options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile", "--only-binary", ":all:")
    to = ("--target", str(python_packages()), "--require-hashes", "-r", str(REQUIREMENTS))
    run(sys.executable, "-m", "pip", "install", *options, *to)


def _install_axe(target: Path) -> None:
    if shutil.which("npm") is None:
        raise BuildError("npm is missing, which installs axe-core; install Debian's npm")
    for name in ("package.json", "package-lock.json"):
        shutil.copyfile(PACKAGE / name, target / name)
    run("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error", cwd=target)


def main() -> None:
    """Build as the arguments and the environment say; print what cannot be had."""
    parser = argparse.ArgumentParser(prog="python -m tests.browser.build")
    parser.add_argument(
        "--for-tests", action="store_true", help="use apt-get only where CI or UPDRAFT_BROWSER_INSTALL is set"
    )
    for_tests: bool = parser.parse_args().for_tests
    try:
        build(_tell, may_use_apt=not for_tests or any(map(os.environ.get, ALLOWED_BY)))
    except BuildError as error:
        if not for_tests:
            sys.exit(str(error))
        _tell(f"Tests in a browser are skipped: {error}")


def _tell(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - a command, whose output this is


if __name__ == "__main__":
    main()
