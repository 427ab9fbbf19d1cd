"""What a manifest must say before a byte of its weights is taken."""

import json
from typing import Any

import pytest
from tests.support.checkpoints import OTHER_TARGET, TARGET, checkpoint, draft, sha256

from updraft.registry.v1 import registry_pb2
from updraft_chassis.errors import InvalidInput, NotFound
from updraft_registry.messages.admission import (
    MAX_MANIFEST_BYTES,
    check_length,
    check_manifest,
    check_name,
    check_speculator,
)
from updraft_registry.rollout.version import DesiredState, Speculator

SPECULATOR = Speculator(name="default", desired=DesiredState(), target=TARGET, latest=3)


@pytest.mark.parametrize("name", ["default", "qwen3-8b", "a", "v1.2_x", "a" * 63])
def test_a_name_is_a_label(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.attack(boundary="registry", attack="a speculator name that is a path", outcome="refused")
@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "A", "a b", "-a", "a-", "a" * 64, "a\n", "é"])
def test_a_name_that_could_be_a_path_or_no_label_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match="is not a valid speculator name"):
        check_name(name)


@pytest.mark.attack(
    boundary="registry",
    attack="a manifest with deep nesting, no target or an absurd size",
    outcome="refused before a byte of weights is taken",
)
@pytest.mark.parametrize(
    ("fields", "why"),
    [
        pytest.param({"digest": "md5:1"}, "digest must be 'sha256:'", id="digest"),
        pytest.param({"digest": sha256(b"").upper()}, "digest must be", id="capitals"),
        pytest.param({"tensors_digest": ""}, "tensors_digest must be", id="tensors digest"),
        pytest.param({"target_fingerprint": ""}, "target_fingerprint is empty", id="no target"),
        pytest.param({"draft_vocabulary_fingerprint": ""}, "draft_vocabulary_fingerprint is", id="no vocabulary"),
        pytest.param({"source": registry_pb2.SOURCE_UNSPECIFIED}, "source is 0", id="no source"),
        pytest.param({"source": 77}, "source is 77", id="unknown source"),
        pytest.param({"size_bytes": 0}, "a draft of 0 bytes", id="empty"),
        pytest.param({"size_bytes": 1001}, "accepts 1 to 1000", id="too large"),
        pytest.param({"config_json": ""}, "config_json is not a JSON object", id="no config"),
        pytest.param({"config_json": "[1]"}, "config_json is not a JSON object", id="array"),
        pytest.param({"config_json": "[" * 50_000}, "config_json is not a JSON object", id="nesting"),
        pytest.param({"speculator": "../etc"}, "is not a valid speculator name", id="path"),
    ],
)
def test_a_manifest_that_is_incomplete_or_out_of_bounds_is_refused(fields: dict[str, Any], why: str) -> None:
    manifest = draft().manifest(**({"size_bytes": 1000} | fields))
    with pytest.raises(InvalidInput, match=why):
        check_manifest(manifest, max_bytes=1000)


def test_a_manifest_that_answers_have_no_room_for_is_refused() -> None:
    check_length(draft().manifest())
    with pytest.raises(InvalidInput, match=f"a manifest of .* the evaluation; at most {MAX_MANIFEST_BYTES}"):
        check_length(draft().manifest(config_json=json.dumps({"padding": "x" * MAX_MANIFEST_BYTES})))


def test_a_complete_manifest_is_admitted() -> None:
    check_manifest(draft().manifest(), max_bytes=10**6)
    check_speculator(draft().manifest(parent_version=3), SPECULATOR)


def test_a_draft_for_another_target_is_refused_with_both() -> None:
    with pytest.raises(InvalidInput) as refused:
        check_speculator(draft().manifest(target_fingerprint=OTHER_TARGET), SPECULATOR)
    assert str(refused.value) == f"the target of this draft is {OTHER_TARGET}, but default is for {TARGET}"


def test_a_draft_with_another_vocabulary_than_its_parent_is_admitted() -> None:
    check_speculator(draft().manifest(parent_version=3, draft_vocabulary_fingerprint=sha256(b"other")), SPECULATOR)


def test_a_parent_that_was_never_published_is_not_found() -> None:
    with pytest.raises(NotFound, match="the parent, version 4, does not exist in default"):
        check_speculator(draft().manifest(parent_version=4), SPECULATOR)


def test_the_first_draft_may_be_for_any_target() -> None:
    empty = Speculator(name="default", desired=DesiredState())
    check_speculator(draft().manifest(target_fingerprint=OTHER_TARGET), empty)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"dtype": "bfloat16"}, id="dtype"),
        pytest.param({"torch_dtype": "torch.bfloat16"}, id="torch_dtype"),
    ],
)
def test_weights_that_engines_would_convert_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=r"tensor norm.weight is F32, but config.json states (torch\.)?bfloat16"):
        check_manifest(draft().manifest(config_json=json.dumps(config)), max_bytes=10**6)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({}, id="nothing is said"),
        pytest.param({"dtype": "bfloat16", "quantization_config": {"quant_method": "fp8"}}, id="quantised and said so"),
    ],
)
def test_weights_that_are_served_as_they_are_or_said_to_be_quantised_are_admitted(config: dict[str, Any]) -> None:
    check_manifest(draft().manifest(config_json=json.dumps(config)), max_bytes=10**6)


def test_integers_and_booleans_have_no_part_in_it() -> None:
    weights = checkpoint(
        {"d2t": ("I64", (1,), bytes(8)), "t2d": ("BOOL", (1,), bytes(1)), "w": ("BF16", (1,), bytes(2))}
    )
    check_manifest(weights.manifest(config_json='{"dtype": "bfloat16"}'), max_bytes=10**6)
