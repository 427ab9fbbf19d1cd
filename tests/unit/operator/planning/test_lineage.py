"""How a lineage starts, and when SGLang pods restart into another one."""

import json
from typing import Any

import pytest
from tests.support.manifests import speculator
from tests.support.observed import as_child, connected, draft_import, observed, settled, version

from updraft.registry.v1 import registry_pb2 as pb
from updraft_operator.api.draft_import import DraftImport
from updraft_operator.planning import imports, lineage
from updraft_operator.planning.conditions import conditions
from updraft_operator.planning.observed import Observed, RegistryView
from updraft_operator.planning.plan import objects

INITIAL: dict[str, Any] = {"draft": {"initial": {"uri": "hf://org/draft"}}}
NAME = lineage.initial_name(observed(INITIAL))
SIZES = {
    "hidden_size": 4096,
    "draft_vocab_size": 32_000,
    "num_attention_heads": 32,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
}


def config(**sizes: Any) -> str:
    return json.dumps(SIZES | sizes)


def stable(number: int, config_json: str, *, is_imported: bool = False) -> pb.Version:
    made = version(number, source=pb.SOURCE_IMPORTED if is_imported else pb.SOURCE_TRAINER)
    made.manifest.config_json = config_json
    return made


def replicas(seen: Observed) -> int:
    return next(
        int(each["spec"]["replicas"])
        for each in objects(seen)
        if each["kind"] == "Deployment" and each["metadata"]["name"] == "qwen-trainer"
    )


WAITING = pb.Pods(connected=2, waiting_for_restart=1)
"""A pod whose server is built for another shape says so, and serves what it has."""
IN_TROUBLE = pb.Pods(connected=1)
"""The only pod serves nothing yet, because its disk is full or the registry is away."""


def sglang(registry: RegistryView, **more: Any) -> Observed:
    return settled({"engine": {"type": "SGLang"}}, registry=registry, **more)


def test_the_draft_that_the_spec_names_is_imported_once() -> None:
    made = lineage.initial_import(observed(INITIAL))
    assert made is not None
    assert (made["kind"], DraftImport.model_validate(made).spec.uri) == ("DraftImport", "hf://org/draft")
    assert lineage.initial_import(observed(INITIAL, imports=(draft_import(NAME),))) is None
    assert lineage.initial_import(observed()) is None


def test_another_draft_in_the_spec_is_another_import() -> None:
    other = {"draft": {"initial": {"uri": "hf://org/draft", "digest": f"sha256:{1:064x}"}}}
    assert lineage.initial_import(observed(other, imports=(draft_import(NAME),))) is not None


def test_the_secret_of_the_draft_can_be_corrected() -> None:
    secret = {"draft": {"initial": {"uri": "hf://org/draft", "secretRef": {"name": "token"}}}}
    corrected = lineage.initial_import(observed(secret, imports=(draft_import(NAME),)))
    assert corrected is not None
    assert corrected["spec"]["secretRef"] == {"name": "token"}
    same = draft_import(NAME, secretRef={"name": "token"})
    assert lineage.initial_import(observed(secret, imports=(same,))) is None


def test_the_trainer_waits_for_the_draft_that_it_has_to_continue() -> None:
    waiting = observed(INITIAL, registry=connected(), imports=(draft_import(NAME),))
    done = observed(INITIAL, registry=connected([version(1)]), imports=(draft_import(NAME),))
    assert (replicas(waiting), replicas(done), replicas(observed(registry=connected()))) == (0, 1, 1)
    assert conditions(waiting)["TrainerReady"][1:] == (
        "WaitingForDraft",
        "the trainer waits for the import of hf://org/draft",
    )


def test_a_failed_import_is_said_where_the_trainer_waits() -> None:
    ready = {"type": "Ready", "status": "False", "reason": "ImportFailed", "message": "its vocabulary is 600"}
    status = {
        "conditions": [{**ready, "lastTransitionTime": "2026-11-25T11:00:00Z"}],
        "jobName": imports.job_name(speculator(INITIAL), draft_import(NAME)),
    }
    waiting = observed(INITIAL, registry=connected(), imports=(draft_import(NAME, status=status),))
    message = conditions(waiting)["TrainerReady"].message
    assert "the import of hf://org/draft failed" in message
    assert "its vocabulary is 600" in message


@pytest.mark.parametrize("num_pods", [0, 1])
def test_a_registry_that_does_not_answer_changes_nothing_for_the_trainer(num_pods: int) -> None:
    seen = observed(INITIAL, imports=(draft_import(NAME),))
    content = next(
        each for each in objects(seen) if each["metadata"]["name"] == "qwen-trainer" and "replicas" in str(each)
    )
    content["spec"]["replicas"] = num_pods
    child = as_child(content)
    assert replicas(observed(INITIAL, imports=seen.imports, children={child.ref: child})) == num_pods


@pytest.mark.parametrize("is_imported", [True, False], ids=["an import", "of the trainer"])
def test_a_passing_trouble_of_all_pods_restarts_none(*, is_imported: bool) -> None:
    seen = sglang(connected([stable(5, config(), is_imported=is_imported)], pods=IN_TROUBLE))
    assert lineage.draft_config(seen) == ""


@pytest.mark.parametrize("phase", [pb.PHASE_STABLE, pb.PHASE_CANARY])
def test_an_import_that_pods_wait_for_gives_them_its_sizes_and_its_successors_keep_them(
    phase: "pb.Phase.ValueType",
) -> None:
    imported = stable(1, config(), is_imported=True)
    imported.phase = phase
    first = sglang(connected([imported], pods=WAITING))
    assert lineage.draft_config(first) == config()
    lost = sglang(connected([version(1, pb.PHASE_ROLLED_BACK)], pods=WAITING), children=first.children)
    assert lineage.draft_config(lost) == config(), "the trainer continues it"
    successor = sglang(connected([stable(2, config(bos_token_id=7))], pods=WAITING), children=first.children)
    assert lineage.draft_config(successor) == config(), "the same text, so that nothing restarts"
    versions = [stable(3, config(draft_vocab_size=8192), is_imported=True)]
    other = sglang(connected(versions, pods=WAITING), children=first.children)
    assert lineage.draft_config(other) == config(draft_vocab_size=8192)


def test_pods_of_vllm_restart_into_other_sizes_too() -> None:
    waiting = settled(
        {"engine": {"type": "VLLM"}}, registry=connected([stable(1, config(), is_imported=True)], pods=WAITING)
    )
    assert lineage.draft_config(waiting) == config()


def test_a_resource_that_is_created_again_with_other_sizes_serves_the_version_that_it_finds() -> None:
    spec = {"engine": {"type": "SGLang"}, "draft": {"vocabSize": 16_000}}
    found = [stable(4, config())]
    one_waits = settled(spec, registry=connected(found, pods=WAITING))
    assert lineage.draft_config(one_waits) == config()
    one_serves = connected(found, pods=pb.Pods(connected=2, waiting_for_restart=1, serving_stable=1))
    assert lineage.draft_config(settled(spec, registry=one_serves, children=one_waits.children)) == config()


def test_pods_that_were_given_an_imports_sizes_go_back_to_those_of_the_trainers_draft() -> None:
    imported = stable(2, config(draft_vocab_size=8192), is_imported=True)
    first = sglang(connected([imported], pods=WAITING))
    lost = stable(2, config(draft_vocab_size=8192), is_imported=True)
    lost.phase = pb.PHASE_ROLLED_BACK
    back = sglang(connected([stable(1, config()), lost], pods=WAITING), children=first.children)
    assert lineage.draft_config(back) == config()


def test_a_first_draft_of_the_trainer_in_canary_restarts_nothing() -> None:
    tried = stable(1, config())
    tried.phase = pb.PHASE_CANARY
    assert lineage.draft_config(sglang(connected([tried], pods=IN_TROUBLE))) == ""


@pytest.mark.parametrize(
    "serving", [{"serving_stable": 1, "waiting_for_restart": 1}, {}], ids=["some serve it", "none waits yet"]
)
def test_an_import_of_the_shape_that_pods_have_restarts_none(serving: dict[str, int]) -> None:
    pods = pb.Pods(connected=2, **serving)
    assert lineage.draft_config(sglang(connected([stable(1, config(), is_imported=True)], pods=pods))) == ""


def test_an_imported_draft_that_does_not_serve_yet_restarts_nothing() -> None:
    waiting = stable(2, config(), is_imported=True)
    waiting.phase = pb.PHASE_PENDING
    served = [stable(1, config(hidden_size=1)), waiting]
    assert lineage.draft_config(sglang(connected(served, pods=IN_TROUBLE))) == ""
    assert lineage.draft_config(sglang(connected(served, pods=WAITING))) == config(hidden_size=1), (
        "of the stable version"
    )


@pytest.mark.parametrize("registry", [RegistryView(), connected()], ids=["no answer", "no versions"])
def test_without_news_the_pods_keep_their_sizes(registry: RegistryView) -> None:
    first = sglang(connected([stable(1, config(), is_imported=True)], pods=WAITING))
    assert (
        lineage.draft_config(observed({"engine": {"type": "SGLang"}}, registry=registry, children=first.children))
        == config()
    )


def test_what_sglang_cannot_serve_restarts_nothing_and_other_engines_have_no_sizes() -> None:
    refused = stable(1, config(norm_before_residual=True), is_imported=True)
    damaged, usual = stable(1, "no JSON", is_imported=True), stable(1, config(), is_imported=True)
    assert lineage.draft_config(sglang(connected([refused], pods=WAITING))) == ""
    assert lineage.draft_config(sglang(connected([damaged], pods=WAITING))) == ""
    assert lineage.draft_config(observed(registry=connected([usual], pods=WAITING))) == ""
