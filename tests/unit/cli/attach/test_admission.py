"""The policy as data; tests/cluster/operator/test_attached.py asks a real API server what it does."""

from tests.support.manifests import ATTACHED, built, one, speculator

from updraft_cli.attach.admission import policy
from updraft_cli.attach.workload import Addition


def _made() -> tuple[dict[str, object], dict[str, object]]:
    owner = speculator(ATTACHED, uri="pvc://models/qwen")
    made, binding = policy(Addition.of(one(built(owner), "ConfigMap", "qwen-attach")["data"]), "qwen", "team")
    return made, binding


def test_the_policy_is_about_new_pods_of_one_namespace_with_one_label_and_fails_open() -> None:
    made, binding = _made()
    spec = made["spec"]
    assert isinstance(spec, dict)

    assert spec["failurePolicy"] == "Ignore"
    constraints = spec["matchConstraints"]
    assert constraints["namespaceSelector"] == {"matchLabels": {"kubernetes.io/metadata.name": "team"}}
    assert constraints["objectSelector"] == {"matchLabels": {"updraft.dev/attach": "qwen"}}
    (rule,) = constraints["resourceRules"]
    assert (rule["resources"], rule["operations"]) == (["pods"], ["CREATE"])
    assert binding["spec"] == {"policyName": "updraft-attach.team.qwen"}
    assert made["metadata"] == binding["metadata"] == {"name": "updraft-attach.team.qwen"}
