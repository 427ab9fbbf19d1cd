"""requirements/*.lock: pins with the hashes of all their files, for development, for each image, and for single tools.

`make lock` writes them after a change of a list in PINS or of the extras in pyproject.toml. uv asks the package index; nothing
here decides on a version, and a lock that needs another version than constraints.txt is an error.
"""

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

FOLDER = Path("requirements")
CONSTRAINTS = Path("constraints.txt")
TOOLS = FOLDER / "tools.lock"

PINS = {
    "development": CONSTRAINTS,
    "docs": Path("tools/docsite/requirements.txt"),
    "browser": Path("tests/browser/requirements.txt"),
}
"""Lists of exact pins with all that they need, by lock: ours, and those of environments beside it."""

EXTRAS = {
    "registry": ("registry",),
    "trainer": ("trainer",),
    "inference": ("inference",),
    "operator": ("operator", "cli"),
}
"""Extras of pyproject.toml by image."""

SMALL = {
    "torch": ("torch", "numpy"),
    "build": ("hatchling",),
}
"""Requirements of a layer of the images, and of the build of our wheel."""

_OLDEST_PYTHON = {"docs": "3.11.5"}
"""Where a pin does not do with every 3.11."""

_TOOLS = ("uv==0.13.9", "cyclonedx-bom==7.5.0")


def main() -> None:
    """Write all locks. CalledProcessError, after uv's own words, if the index or the pins do not fit."""
    pinned = ("-c", str(CONSTRAINTS))
    for name, pins in PINS.items():
        _compile(name, "--no-deps", str(pins))
    for image, extras in EXTRAS.items():
        chosen = [word for extra in extras for word in ("--extra", extra)]
        _compile(image, "pyproject.toml", *chosen, *pinned, "--only-binary", ":all:")
    for name, requirements in SMALL.items():
        _compile(name, "-", *pinned, "--only-binary", ":all:", text="\n".join(requirements))
    _compile("tools", "-", "--only-binary", ":all:", text="\n".join(_TOOLS))


def _compile(name: str, *words: str, text: str = "") -> None:
    options = (
        "--generate-hashes",
        "--no-header",
        "--no-annotate",
        "--universal",
        "--python-version",
        _OLDEST_PYTHON.get(name, "3.11"),
        "--quiet",
    )
    command = [str(program("uv")), "pip", "compile", *options, *words, "--output-file", str(FOLDER / f"{name}.lock")]
    # What pip finds on this machine beside the index has hashes of its own.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("UV_FIND_LINKS")}
    subprocess.run(command, input=text, text=True, check=True, env=environment)  # noqa: S603 - a pinned program


def program(name: str) -> Path:
    """The path of a tool, which is installed with its hashes into an environment of its own in the cache, once."""
    key = hashlib.sha256(TOOLS.read_bytes() + sys.version.encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "updraft"
    folder = cache / f"tools-{key}"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        install = [
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--require-hashes",
            "-r",
            str(TOOLS),
        ]
        subprocess.run([str(folder / "bin" / "python"), "-m", "pip", *install], check=True)  # noqa: S603 - our own file
        (folder / "ready").touch()
    return folder / "bin" / name


if __name__ == "__main__":
    main()
