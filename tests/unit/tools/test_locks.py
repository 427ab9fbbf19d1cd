"""Locks are pins with hashes: no other version, no version without one, and nothing beside them."""

import re
import tomllib
from pathlib import Path

import pytest
from tools import locks

ROOT = Path(__file__).parents[3]
OURS = (*locks.EXTRAS, *locks.SMALL)


def normal(name: str) -> str:
    """As in an index: extras cut off, and one spelling."""
    return re.sub(r"[-_.]+", "-", name.partition("[")[0]).lower()


def pins(text: str) -> dict[str, str]:
    return {normal(name): version for name, version in re.findall(r"^([\w.\[\],-]+)==([^\s;\\]+)", text, re.MULTILINE)}


def lock(name: str) -> str:
    return (ROOT / locks.FOLDER / f"{name}.lock").read_text()


CONSTRAINTS = pins((ROOT / locks.CONSTRAINTS).read_text())


@pytest.mark.parametrize("name", locks.PINS)
def test_an_environment_installs_exactly_what_is_pinned(name: str) -> None:
    assert pins(lock(name)) == pins((ROOT / locks.PINS[name]).read_text())


@pytest.mark.parametrize("name", OURS)
def test_an_image_installs_versions_that_are_pinned(name: str) -> None:
    found = pins(lock(name))
    assert found
    assert found.items() <= CONSTRAINTS.items()


@pytest.mark.attack(
    boundary="images",
    attack="an index, or somebody between, that serves another file for a pinned version",
    outcome="pip refuses it: every file that we install has a hash in the checkout",
)
@pytest.mark.parametrize("name", [*locks.PINS, *OURS, "tools"])
def test_every_requirement_has_hashes_and_no_address(name: str) -> None:
    text = lock(name)
    assert "://" not in text
    entries = re.split(r"\n(?=\S)", text.strip())
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", entry) for entry in entries)


@pytest.mark.parametrize("image", locks.EXTRAS)
def test_an_image_has_everything_that_its_extras_ask_for(image: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [project["optional-dependencies"][extra] for extra in locks.EXTRAS[image]]
    wanted = {normal(re.split(r"[<>=\[ ]", words)[0]) for words in sum(extras, project["dependencies"])}
    assert wanted <= pins(lock(image)).keys()


def test_whatever_is_installed_is_checked_by_its_hash() -> None:
    makefile, dockerfile = ((ROOT / name).read_text().replace("\\\n", " ") for name in ("Makefile", "Dockerfile"))
    commands = [
        line for line in [*makefile.splitlines(), *dockerfile.splitlines()] if re.search(r"pip\S* .*\binstall\b", line)
    ]
    ours = ("/wheels/*.whl", "-e .")  # built here
    assert len(commands) >= 5
    assert [line for line in commands if "--require-hashes" not in line and not any(own in line for own in ours)] == []
