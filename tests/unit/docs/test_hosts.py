"""No link, default or address leads to a host that somebody else could own: whoever owns it could answer for us."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FOLDERS = ("bench", "charts", "cli", "docs", "examples", "libs", "operator", "proto", "services", "tools")
SUFFIXES = {"", ".conf", ".json", ".md", ".proto", ".py", ".toml", ".tpl", ".txt", ".yaml"}
FILES = sorted(
    path
    for path in [*ROOT.glob("*"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
    if path.is_file() and path.suffix in SUFFIXES and "results" not in path.parts
)

OURS = "updraft.dev"
"""The API group. It is a name and not an address: nobody serves anything there."""

KNOWN = {
    *("arxiv.org", "developmentseed.org", "docs.ray.io", "doi.org", "github.com", "huggingface.co", "json-schema.org"),
    *("keepachangelog.com", "kubernetes.io", "llm-d.ai", "pypi.org", "semver.org", "www.apache.org", "cyclonedx.org"),
    "www.w3.org",  # the namespace of SVG
    "kubernetes.default.svc",  # of every cluster
}
"""Hosts of those who are meant."""

RESERVED = re.compile(r"(?:^|\.)(?:example(?:\.com|\.org|\.net)?|test|invalid|localhost|svc|svc\.cluster\.local)$")
"""Names that nobody can register (RFC 2606), and those within a cluster."""

_URL = re.compile(r"\b(?:https?|oci|rediss?|grpcs?|s3\+http)://(?:[^\s/@'\"`]*@)?([A-Za-z0-9.-]+)")
_MAIL = re.compile(r"\b[\w.+-]+@([\w-]+(?:\.[\w-]+)*\.(?:com|org|net|dev|io|ai))\b")


def hosts(text: str) -> set[str]:
    """Hosts of addresses in a text. One word alone is a placeholder or within a network."""
    found = {match.rstrip(".").lower() for pattern in (_URL, _MAIL) for match in pattern.findall(text)}
    return {host for host in found if "." in host and not re.fullmatch(r"[\d.]+", host)}


def test_every_host_is_known_or_nobodys() -> None:
    unknown = {
        f"{path.relative_to(ROOT)}: {host}"
        for path in FILES
        for host in hosts(path.read_text(encoding="utf-8"))
        if host not in KNOWN and not RESERVED.search(host)
    }
    assert unknown == set()


def test_nothing_is_served_at_the_name_of_the_api_group() -> None:
    assert OURS not in KNOWN
    assert not any(f"//{OURS}" in path.read_text(encoding="utf-8") for path in FILES)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see https://updraft.dev/docs", {"updraft.dev"}),
        ("report to security@updraft.dev", {"updraft.dev"}),
        ("redis://user:password@redis.somewhere.net:6379/0", {"redis.somewhere.net"}),
        ("http://127.0.0.1:8000 and https://host/x", set()),
    ],
)
def test_hosts_are_found_in_addresses(text: str, found: set[str]) -> None:
    assert hosts(text) == found
