"""The CRDs as files: a plain `kubectl apply` takes them, and a second one finds nothing to do."""

from pathlib import Path

from tests.cluster.control_plane import ControlPlane, control_plane
from tests.cluster.crds import install

from updraft_operator.api import crd

_CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
_NAMES = ("adaptivespeculators.updraft.dev", "draftimports.updraft.dev", "draftversions.updraft.dev")


def test_plain_kubectl_applies_the_crds_and_a_second_time_changes_nothing(
    kubernetes: ControlPlane, tmp_path: Path
) -> None:
    """On an API server of its own that knows no kind; `kubernetes` is asked for only to skip where nothing is built."""
    for name, text in crd.files().items():
        (tmp_path / name).write_text(text)
    with control_plane() as empty, empty.api() as api:
        first = empty.kubectl("apply", "-f", str(tmp_path))
        empty.kubectl("wait", "--for=condition=Established", "--timeout=60s", *(f"crd/{name}" for name in _NAMES))
        before = [api.get(f"{_CRDS}/{name}") for name in _NAMES]
        second = empty.kubectl("apply", "-f", str(tmp_path))
        empty.kubectl("diff", "-f", str(tmp_path))

        assert [line.split()[-1] for line in first.splitlines()] == ["created"] * 3
        assert [line.split()[-1] for line in second.splitlines()] == ["unchanged"] * 3
        assert [api.get(f"{_CRDS}/{name}") for name in _NAMES] == before
        for definition in before:
            conditions = {entry["type"]: entry["status"] for entry in definition["status"]["conditions"]}
            assert conditions.get("NonStructuralSchema", "False") == "False"
            assert conditions["NamesAccepted"] == "True"


def test_installing_twice_is_as_good_as_once(kubernetes: ControlPlane) -> None:
    with kubernetes.api() as api:
        install(api)
        before = [api.get(f"{_CRDS}/{name}")["metadata"]["resourceVersion"] for name in _NAMES]
        install(api)
        assert [api.get(f"{_CRDS}/{name}")["metadata"]["resourceVersion"] for name in _NAMES] == before
