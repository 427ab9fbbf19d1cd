"""Each rule in CEL lets the good one in and refuses the bad one with its message, on the real API server."""

import re

import pytest
from tests.cluster.access import Api, ApiError
from tests.cluster.crd.resources import Json, apply, resource
from tests.cluster.crd.rules import RULES, Rule

each_rule = pytest.mark.parametrize("rule", [pytest.param(rule, id=rule.id) for rule in RULES])


@each_rule
def test_a_rule_lets_in_what_keeps_it(rule: Rule, api: Api, namespace: str) -> None:
    _begin(api, namespace, rule, rule.name)
    stored = apply(api, namespace, rule.kind, resource(rule.kind, rule.name, **rule.good))
    assert stored["metadata"]["name"] == rule.name


@each_rule
def test_a_rule_refuses_what_breaks_it_in_a_sentence(rule: Rule, api: Api, namespace: str) -> None:
    _begin(api, namespace, rule, rule.bad_name)
    with pytest.raises(ApiError, match=re.escape(rule.message)) as refused:
        apply(api, namespace, rule.kind, resource(rule.kind, rule.bad_name, **rule.bad))
    assert (refused.value.code, refused.value.reason) == (422, "Invalid")


def test_a_change_of_the_target_is_refused_where_it_was_written(api: Api, namespace: str) -> None:
    apply(api, namespace, "asp", resource("asp"))
    with pytest.raises(ApiError, match=r"spec\.targetModel\.uri: Forbidden: targetModel\.uri is immutable"):
        apply(api, namespace, "asp", resource("asp", targetModel={"uri": "hf://org/other"}))


def test_storage_may_not_be_changed_through_a_patch_either(api: Api, namespace: str) -> None:
    apply(api, namespace, "asp", resource("asp"))
    for part in ("registry", "trainer"):
        change: Json = {"spec": {part: {"storage": {"size": "50Gi"}}}}
        with pytest.raises(ApiError, match="storage is immutable: Kubernetes cannot change a claim"):
            api.patch(f"/apis/updraft.dev/v1alpha1/namespaces/{namespace}/adaptivespeculators/chat", change)


def test_an_attachment_to_all_pods_of_a_namespace_is_refused(api: Api, namespace: str) -> None:
    everything: Json = {"mode": "Attached", "attached": {"selector": {"matchLabels": {}}}}
    with pytest.raises(ApiError, match=r"matchLabels.*should have at least 1 properties"):
        apply(api, namespace, "asp", resource("asp", engine={"type": "VLLM"}, serving=everything))


def _begin(api: Api, namespace: str, rule: Rule, name: str) -> None:
    if rule.before is not None:
        apply(api, namespace, rule.kind, resource(rule.kind, name, **rule.before))
