"""The chart as tests see it: rendered by the real helm, document by document."""

import functools
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.cluster import programs

Document = dict[str, Any]

CHECKOUT = Path(__file__).parents[2]
CHART = CHECKOUT / "charts" / "updraft"
RELEASE, NAMESPACE = "updraft", "updraft-system"
CASES = sorted(path.stem.removesuffix("-values") for path in (CHART / "ci").glob("*-values.yaml"))
"""What is rendered: one case a file of values."""


def helm(*words: str | Path, kubeconfig: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run helm; the test is skipped where it was not built. Its caches are nobody's."""
    program = programs.find("helm")
    if program is None:
        pytest.skip("helm: not built; run `make cluster-build`")
    with tempfile.TemporaryDirectory() as home:
        folders = {f"HELM_{kind}_HOME": home for kind in ("CACHE", "CONFIG", "DATA")}
        access = {} if kubeconfig is None else {"KUBECONFIG": str(kubeconfig)}
        return subprocess.run(
            [program, *words],
            env={**os.environ, **folders, **access},
            text=True,
            capture_output=True,
            check=False,
            timeout=300,
        )


def values(case: str) -> Path:
    """The file of a case."""
    return CHART / "ci" / f"{case}-values.yaml"


@functools.cache
def rendered(case: str, *words: str) -> tuple[Document, ...]:
    """Every document of a case, hooks and tests too; `words` are further words of `helm template`."""
    result = helm("template", RELEASE, CHART, "--namespace", NAMESPACE, "--values", values(case), *words)
    assert result.returncode == 0, result.stderr
    return tuple(document for document in yaml.safe_load_all(result.stdout) if document)


def refusal(*words: str) -> str:
    """Why helm does not render the chart with these words."""
    result = helm("template", RELEASE, CHART, "--namespace", NAMESPACE, *words)
    assert result.returncode != 0, "it was rendered"
    return result.stderr


def of_kind(documents: tuple[Document, ...], *kinds: str) -> list[Document]:
    """The documents of some kinds."""
    return [document for document in documents if document["kind"] in kinds]


def one(documents: tuple[Document, ...], kind: str, name: str) -> Document:
    """The document of a kind and a name."""
    (found,) = [document for document in of_kind(documents, kind) if document["metadata"]["name"] == name]
    return found


def pods(documents: tuple[Document, ...]) -> Iterator[tuple[str, Document]]:
    """Name and pod spec of all that runs."""
    for document in documents:
        spec = document.get("spec", {})
        name = f"{document['kind']}/{document['metadata']['name']}"
        if document["kind"] == "Pod":
            yield name, spec
        elif "containers" in spec.get("template", {}).get("spec", {}):
            yield name, spec["template"]["spec"]


def title(document: Document) -> str:
    """Kind and name, for messages."""
    return f"{document['kind']}/{document['metadata']['name']}"
