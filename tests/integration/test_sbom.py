"""Bills of materials: what a scanner reads is what an image installs, in the form that CycloneDX's own schema asks for."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tools import locks, sbom

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(900)  # the tools may have to be installed first

_VALIDATE = """
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(sys.stdin.read())
sys.exit(1 if error else 0)
"""


def is_valid(bill: dict[str, Any]) -> bool:
    """By the schema of CycloneDX 1.6, strictly."""
    command = [str(locks.program("python")), "-c", _VALIDATE]
    return subprocess.run(command, input=json.dumps(bill), text=True, check=False).returncode == 0


@pytest.mark.parametrize("image", locks.EXTRAS)
def test_the_bill_of_an_image_names_each_package_of_its_lock_with_its_hashes(
    image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    sbom.write(image, tmp_path / "bill.json")
    bill = json.loads((tmp_path / "bill.json").read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert bill["metadata"]["component"]["name"] == f"updraft-{image}"
    locked = (ROOT / locks.FOLDER / f"{image}.lock").read_text()
    pins = set(re.findall(r"^([\w.-]+)(?:\[[\w,]+\])?==([^\s;\\]+)", locked, re.MULTILINE))
    assert {(each["name"], each["version"]) for each in bill["components"]} == pins
    hashes = {
        entry["content"]
        for each in bill["components"]
        for reference in each["externalReferences"]
        for entry in reference["hashes"]
    }
    assert hashes == set(re.findall(r"sha256:([0-9a-f]{64})", locked))
    assert is_valid(bill)
    assert not is_valid(bill | {"components": [{"type": "moon"}]})


def test_a_bill_is_the_same_whenever_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name in ("one", "two"):
        sbom.write("registry", tmp_path / name)
    assert (tmp_path / "one").read_text() == (tmp_path / "two").read_text()
