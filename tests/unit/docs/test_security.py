"""SECURITY.md names what exists: every port that pods open, and no address that nobody reads."""

import re
from pathlib import Path

import pytest
import yaml
from tests.support.manifests import built, containers, speculator, templates

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "SECURITY.md").read_text()

SPECS = {
    "built-in engine": {},
    "SGLang": {"engine": {"type": "SGLang"}},
    "vLLM": {"engine": {"type": "VLLM"}},
    "ranks": {"trainer": {"nodes": 2}},
}


def listed() -> set[int]:
    """Ports in the table."""
    table = TEXT.partition("## Ports")[2].partition("\n## ")[0]
    return {int(port) for port in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_every_port_of_a_pod_is_in_the_table(spec: dict[str, object]) -> None:
    objects = built(speculator(spec))
    in_pods = {
        port["containerPort"]
        for template in templates(objects).values()
        for container in containers(template["spec"])
        for port in container.get("ports", ())
    }
    in_services = {
        port["port"]
        for each in objects
        if each["kind"] == "Service"
        for port in each["spec"]["ports"]
        if port["port"] != 80
    }
    assert in_pods
    assert in_pods | in_services <= listed()


def test_every_port_of_the_charts_pods_is_in_the_table() -> None:
    sources = [path.read_text() for path in (ROOT / "charts" / "updraft" / "templates").rglob("*.yaml")]
    ports = {int(port) for source in sources for port in re.findall(r"containerPort: (\d+)", source)}
    assert ports
    assert ports <= listed()


def test_a_report_goes_to_the_hosting_service_and_to_no_address_that_we_would_have_to_own() -> None:
    report = TEXT.partition("## Reporting")[2].partition("\n## ")[0]
    assert "Report a vulnerability" in report
    assert not re.search(r"\S@\S|https?://", report)


def test_every_boundary_says_what_is_not_defended() -> None:
    table = TEXT.partition("## Boundaries")[2].partition("\n**Never")[0]
    rows = re.findall(r"^\| (.+) \| (.+) \| (.+) \|$", table, re.MULTILINE)[2:]
    assert len(rows) == len(set(rows)) >= 9
    assert all(cell.strip(" -") for row in rows for cell in row)


def test_the_chart_installs_network_policies_by_default() -> None:
    values = yaml.safe_load((ROOT / "charts" / "updraft" / "values.yaml").read_text())
    assert values["networkPolicy"]["enabled"] is True
