"""Installs what the tests of the console need: `python -m tests.browser.build`, which is `make browser`.

Chromium and its driver are Debian's packages, installed if they are missing and this is root on Debian. Selenium and axe-core
go into the cache, one folder for each content of requirements.txt and of cli/package-lock.json; it is complete once it holds
the file `ready`. They are not among the pins of constraints.txt, because everybody would download those again.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
PACKAGE = ROOT / "cli"
"""package.json and its lock: the console's libraries, and axe-core for tests."""
LIBRARY = ROOT / "cli/updraft_cli/ui/static/vendor/htmx.min.js"
"""One of those that the installation of this checkout vendors."""
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "updraft"

DEBIAN_PACKAGES = ("chromium", "chromium-driver", "fonts-inter")
PROGRAMS = ("chromium", "chromedriver")


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
    return (
        ""
        if LIBRARY.exists()
        else "the console was installed without npm; remove .venv/ready and run `make install` with it"
    )


def build(tell: Callable[[str], None]) -> None:
    """Install what is missing. Raises BuildError."""
    CACHE.mkdir(parents=True, exist_ok=True)
    target = folder()
    with target.with_name(f"{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _install_chromium(tell)
        if not (target / "ready").exists():
            tell(f"Installing Selenium and axe-core into {target} (once; 40 MB) ...")
            shutil.rmtree(target, ignore_errors=True)  # of a build that was interrupted
            target.mkdir()
            _install_selenium()
            _install_axe(target)
            (target / "ready").touch()


def _install_chromium(tell: Callable[[str], None]) -> None:
    if all(map(shutil.which, PROGRAMS)):
        return
    packages = " ".join(DEBIAN_PACKAGES)
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise BuildError(f"Chromium and its driver are missing; as root on Debian: apt-get install {packages}")
    tell(f"Installing Debian's {packages} (once; about 350 MB) ...")
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    _run("apt-get", "-qq", "-o", "Acquire::http::Timeout=20", "-o", "Acquire::Retries=1", "update", environ=environ)
    _run(
        "apt-get",
        "-qq",
        "-o",
        "DPkg::Lock::Timeout=300",
        "install",
        "--yes",
        "--no-install-recommends",
        *DEBIAN_PACKAGES,
        environ=environ,
    )


def _install_selenium() -> None:
    options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile", "--only-binary", ":all:")
    _run(sys.executable, "-m", "pip", "install", *options, "--target", str(python_packages()), "-r", str(REQUIREMENTS))


def _install_axe(target: Path) -> None:
    if shutil.which("npm") is None:
        raise BuildError("npm is missing, which installs axe-core; install Debian's npm")
    for name in ("package.json", "package-lock.json"):
        shutil.copyfile(PACKAGE / name, target / name)
    _run("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error", cwd=target)


def _run(*command: str, cwd: Path | None = None, environ: dict[str, str] | None = None) -> None:
    result = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise BuildError(f"`{' '.join(command)}` failed: {(result.stderr or result.stdout).strip()[-2000:]}")


if __name__ == "__main__":
    try:
        build(print)
    except BuildError as error:
        sys.exit(str(error))
