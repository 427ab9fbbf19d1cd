"""The examples are resources that the operator understands, and that it makes what they say of."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support.manifests import built, container, one

from updraft_operator.api.speculator import AdaptiveSpeculator

EXAMPLES = sorted(Path("examples").glob("*.yaml"))


def _read(path: Path) -> tuple[dict[str, Any], AdaptiveSpeculator]:
    written = yaml.safe_load(path.read_text())
    written["metadata"] |= {"namespace": "team", "uid": "1"}
    return written, AdaptiveSpeculator.model_validate(written)


def _unread(written: Any, understood: Any, path: str) -> list[str]:
    """Fields that were written and that the model does not have."""
    if not isinstance(written, dict) or not isinstance(understood, dict):
        return []
    missing = [f"{path}.{name}" for name in written if name not in understood]
    return missing + [name for key in written for name in _unread(written[key], understood.get(key), f"{path}.{key}")]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_has_no_field_that_the_operator_does_not_know(path: Path) -> None:
    written, owner = _read(path)

    assert _unread(written["spec"], owner.spec.model_dump(mode="json", by_alias=True), "spec") == []
    assert built(owner)


def test_the_example_with_a_gpu_trains_on_it() -> None:
    _, owner = _read(Path("examples/trainer-gpu-8b.yaml"))
    deployment = one(built(owner), "Deployment", "qwen3-8b-trainer")["spec"]["template"]["spec"]

    assert container(deployment, "trainer")["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert one(built(owner), "ConfigMap", "qwen3-8b-trainer")["data"]["UPDRAFT_TRAINER_DEVICE"] == "cuda"


def test_the_example_with_two_nodes_has_a_stream_and_four_threads_for_each_rank() -> None:
    _, owner = _read(Path("examples/trainer-two-nodes.yaml"))
    data = one(built(owner), "ConfigMap", "llama-70b-trainer")["data"]

    assert owner.spec.trainer.num_ranks == owner.spec.traces.shards == 16
    assert (data["UPDRAFT_TRAINER_STREAM_SHARDS"], data["UPDRAFT_TRAINER_NUM_THREADS"]) == ("16", "4")
    assert one(built(owner), "StatefulSet", "llama-70b-trainer")["spec"]["replicas"] == 2
