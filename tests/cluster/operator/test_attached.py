"""A Deployment of somebody else, attached by hand: the real API server takes the patch, and its pods report to the registry."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest
import yaml
from tests.cluster.access import ApiError, Json
from tests.cluster.kubectl import Kubectl, admin, as_user, path
from tests.cluster.operator import requests
from tests.cluster.operator.conftest import Running
from tests.cluster.operator.own_registries import bearing, own_registry
from tests.cluster.operator.subject import Subject, running
from tests.support.checkpoints import draft
from tests.support.ports import free_port
from tests.support.registry import PodStream, RegistryProcess, publish, registry_stub
from tests.support.wait import wait_until

from updraft_chassis import rpc
from updraft_chassis.errors import Unauthenticated
from updraft_operator.api import names

__all__ = ["admin", "as_user", "path"]  # fixtures

LABELS = {"app": "vllm"}
ATTACHED = {
    "engine": {"type": "VLLM"},
    "serving": {"mode": "Attached", "attached": {"selector": {"matchLabels": LABELS}}},
}
_LOOK_S = 60.0
"""Some looks of the operator at pods that are not its own."""
_REPORT_S = 5.0


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def settings(port: int) -> dict[str, object]:
    return {"registry_address": f"127.0.0.1:{port}"}


@pytest.fixture
def attached(operator: Running, subject: Subject) -> Subject:
    """A speculator for pods of another workload."""
    subject.create(**ATTACHED, rollout={"strategy": "Immediate"})
    wait_until(lambda: subject.exists("ConfigMap", f"{subject.name}-attach"), what="the description of what pods need")
    return subject


@pytest.fixture
def deployment(attached: Subject) -> Callable[[], Json]:
    """Somebody's Deployment of two pods; call it to read it."""
    server = {"name": "vllm", "image": "vllm/vllm-openai:v0.32.0", "args": ["--model", "/models/target"]}
    template = {"metadata": {"labels": LABELS}, "spec": {"containers": [server, {"name": "proxy", "image": "envoy"}]}}
    spec = {"replicas": 2, "selector": {"matchLabels": LABELS}, "template": template}
    content = {"metadata": {"name": "vllm"}, "spec": spec}
    attached.api.create(attached.path("Deployment").rpartition("/")[0], content)
    return lambda: attached.get("Deployment", "vllm")


@pytest.fixture
def patched(attached: Subject, deployment: Callable[[], Json], admin: Kubectl, tmp_path: Path) -> Callable[[], Json]:
    """The same, after the commands of the page."""
    made = admin("updraft", "attach", attached.name, "deployment/vllm")
    assert (made.code, made.err) == (0, "")
    (tmp_path / "patch.yaml").write_text(made.out)
    words = ("patch", "deployment", "vllm", "-n", attached.namespace, "--patch-file", str(tmp_path / "patch.yaml"))
    assert admin(*words).err == ""
    return deployment


@pytest.fixture
def registry(operator: Running, attached: Subject, port: int, tmp_path: Path) -> Iterator[RegistryProcess]:
    with own_registry(operator.cluster, attached, port, tmp_path) as process:
        yield process


def pods(subject: Subject, *, is_injected: bool) -> list[Json]:
    found = subject.all_of("Pod", **LABELS)
    return [pod for pod in found if (names.ATTACH in pod["metadata"]["labels"]) == is_injected and not _is_going(pod)]


def run(subject: Subject) -> list[str]:
    """Act as a kubelet would, until both pods of the patched template are ready. Returns their names."""

    def both() -> bool:
        for pod in (*pods(subject, is_injected=True), *pods(subject, is_injected=False)):
            with suppress(ApiError):  # a pod of the former template may be gone by now
                subject.set_pod(pod["metadata"]["name"], running(pod))
        return len(pods(subject, is_injected=True)) == 2 and not pods(subject, is_injected=False)

    wait_until(both, what="two pods of the patched template")
    return sorted(pod["metadata"]["name"] for pod in pods(subject, is_injected=True))


def test_pods_that_have_no_agent_are_named_and_left_alone(
    operator: Running, attached: Subject, deployment: Callable[[], Json]
) -> None:
    wait_until(lambda: len(pods(attached, is_injected=False)) == 2, what="the pods of the Deployment")

    message = attached.wait_for("Attached", "False", "NotInjected", timeout_s=_LOOK_S)

    for pod in pods(attached, is_injected=False):
        assert pod["metadata"]["name"] in message
    assert "it has no container updraft-agent" in message
    assert attached.condition("Accepted") == ("True", "SpecAccepted")
    assert not attached.exists("Service", attached.name)
    assert not attached.exists("Deployment", f"{attached.name}-serving")
    assert attached.all_of("PodDisruptionBudget") == []
    policies = [policy["spec"]["podSelector"]["matchLabels"] for policy in attached.all_of("NetworkPolicy")]
    assert all(selector.get(names.SPECULATOR) == attached.name for selector in policies), "none selects their pods"


def test_the_patch_adds_to_the_deployment_and_takes_nothing_from_it(
    attached: Subject, patched: Callable[[], Json], admin: Kubectl
) -> None:
    template = patched()["spec"]["template"]
    server, proxy = template["spec"]["containers"]

    assert (server["name"], server["image"], proxy["image"]) == ("vllm", "vllm/vllm-openai:v0.32.0", "envoy")
    assert server["args"][:2] == ["--model", "/models/target"]
    assert json.loads(server["args"][2].partition("=")[2])["method"] == "eagle3"
    assert template["metadata"]["labels"] == {**LABELS, names.ATTACH: attached.name}
    assert [(each["name"], each.get("restartPolicy")) for each in template["spec"]["initContainers"]] == [
        ("updraft-prepare", None),
        ("updraft-agent", "Always"),
    ]
    again = admin("updraft", "attach", attached.name, "deployment/vllm")
    unchanged = admin("patch", "deployment", "vllm", "-n", attached.namespace, "-p", again.out)
    assert "no change" in unchanged.out


def test_a_kustomize_component_makes_the_same_of_the_base(
    attached: Subject, deployment: Callable[[], Json], patched: Callable[[], Json], admin: Kubectl, tmp_path: Path
) -> None:
    """The commands of the page, with kubectl's own kustomize."""
    before = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "vllm"}}
    own = {"name": "vllm", "image": "vllm/vllm-openai:v0.32.0", "args": ["--model", "/models/target"]}
    spec = {
        "template": {"metadata": {"labels": LABELS}, "spec": {"containers": [own, {"name": "proxy", "image": "envoy"}]}}
    }
    (tmp_path / "deployment.yaml").write_text(yaml.safe_dump({**before, "spec": spec}))
    (tmp_path / "kustomization.yaml").write_text(
        yaml.safe_dump({"resources": ["deployment.yaml"], "components": ["updraft"]})
    )
    (tmp_path / "updraft").mkdir()
    component = admin("updraft", "attach", attached.name, "deploy/vllm", "-o", "kustomize")
    (tmp_path / "updraft" / "kustomization.yaml").write_text(component.out)

    built = admin("kustomize", str(tmp_path))

    assert built.code == 0, built.err
    made, live = yaml.safe_load(built.out)["spec"]["template"], patched()["spec"]["template"]
    assert made["metadata"]["labels"] == live["metadata"]["labels"]
    (ours, _), (theirs, _) = made["spec"]["containers"], live["spec"]["containers"]
    assert (ours["args"], ours["env"], ours["volumeMounts"]) == (theirs["args"], theirs["env"], theirs["volumeMounts"])
    assert [each["name"] for each in made["spec"]["volumes"]] == [each["name"] for each in live["spec"]["volumes"]]


async def test_attached_pods_report_with_their_own_account_and_follow_the_registry(
    operator: Running, attached: Subject, patched: Callable[[], Json], registry: RegistryProcess
) -> None:
    """Agents are streams of the test here, with the tokens that a kubelet would mount."""
    first, second = run(attached)
    assert "are ready" in attached.wait_for("Available", "True", "PodsReady", timeout_s=_LOOK_S)
    silent = attached.wait_for("Attached", "Unknown", "PodsStarting", timeout_s=_LOOK_S)
    assert first in silent
    assert second in silent

    async with AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(_agent(registry, attached, name)) for name in (first, second)]
        await asyncio.to_thread(attached.wait_for, "Attached", "True", "Attached", timeout_s=_LOOK_S)
        asked = {"spec": {"audiences": [_audience(attached)]}}
        person = attached.api.create(attached.path("ServiceAccount", attached.name, "token"), asked)["status"]["token"]
        async with bearing(registry, person) as channel:
            await publish(registry_stub(channel), draft(seed=1), speculator=attached.name)
        for stream in streams:
            await stream.receive_version(1)
    assert attached.get("AdaptiveSpeculator")["status"]["serving"]["replicas"] == 2


async def test_an_account_that_the_spec_does_not_name_is_refused(attached: Subject, registry: RegistryProcess) -> None:
    attached.api.create(attached.path("ServiceAccount").rpartition("/")[0], {"metadata": {"name": "other"}})
    path = attached.path("ServiceAccount", "other", "token")
    token = attached.api.create(path, {"spec": {"audiences": [_audience(attached)]}})["status"]["token"]

    async with bearing(registry, token) as channel:
        with pytest.raises(Unauthenticated, match="has no role in this registry"), rpc.errors():
            await publish(registry_stub(channel), draft(seed=1), speculator=attached.name)


def test_the_deployment_outlives_the_speculator_and_nobody_else_writes_it(
    operator: Running, attached: Subject, patched: Callable[[], Json]
) -> None:
    run(attached)
    generation = patched()["metadata"]["generation"]
    since = requests.now()

    attached.delete()
    wait_until(lambda: not attached.objects(), what="the end of all that the operator made")

    assert patched()["metadata"]["generation"] == generation
    assert len(pods(attached, is_injected=True)) == 2
    for write in requests.writes(operator.cluster, operator.account.user, since, namespace=attached.namespace):
        assert "vllm" not in str(write)


@pytest.fixture
def policy(attached: Subject, admin: Kubectl, tmp_path: Path) -> Iterator[None]:
    """The admission policy, in force."""
    made = admin("updraft", "attach", attached.name, "-o", "policy")
    assert (made.code, made.err) == (0, "")
    (tmp_path / "policy.yaml").write_text(made.out)
    applied = admin("apply", "-f", str(tmp_path / "policy.yaml"))
    assert applied.code == 0, applied.err
    wait_until(lambda: "updraft-agent" in _tried(attached), what="the policy is in force")
    yield
    admin("delete", "-f", str(tmp_path / "policy.yaml"))


def test_the_policy_adds_to_labelled_pods_what_the_patch_does(
    policy: None, attached: Subject, patched: Callable[[], Json]
) -> None:
    by_hand = patched()["spec"]["template"]
    server = {"name": "vllm", "image": "vllm", "args": ["--model", "/models/target"]}

    made = _created(attached, "by-policy", [server, {"name": "proxy", "image": "envoy"}])

    for part in ("initContainers", "volumes"):
        ours = [_plain(each) for each in made["spec"][part] if each["name"].startswith("updraft-")]
        assert ours == [_plain(each) for each in by_hand["spec"][part]], part
    (of_policy, proxy), of_patch = made["spec"]["containers"], by_hand["spec"]["containers"][0]
    assert of_policy["args"] == of_patch["args"]
    variables = {each["name"]: each["value"] for each in of_policy["env"]}
    assert variables == {each["name"]: each["value"] for each in of_patch["env"]}
    assert of_patch["volumeMounts"][0] in of_policy["volumeMounts"]
    assert "env" not in proxy
    assert made["metadata"]["annotations"] == by_hand["metadata"]["annotations"]


def test_the_policy_keeps_a_servers_own_path_and_arguments(policy: None, attached: Subject) -> None:
    own = {
        "name": "vllm",
        "image": "vllm",
        "env": [{"name": "A", "value": "1"}, {"name": "PYTHONPATH", "value": "/own"}],
    }

    made = _created(attached, "with-path", [own])

    (server,) = made["spec"]["containers"]
    variables = {each["name"]: each["value"] for each in server["env"]}
    assert variables["A"] == "1"
    assert variables["PYTHONPATH"] == "/var/lib/updraft/server/plugin:/own"
    assert len(server["args"]) == 1


@pytest.mark.parametrize(
    ("containers", "labels"),
    [
        pytest.param([{"name": "a", "image": "a"}, {"name": "b", "image": "b"}], {}, id="nobody knows the server"),
        pytest.param([{"name": "vllm", "image": "a", "args": ["--speculative-config={}"]}], {}, id="own speculation"),
        pytest.param([{"name": "vllm", "image": "a"}], {names.ATTACH: "another"}, id="another speculator"),
        pytest.param([{"name": "vllm", "image": "a"}], {names.ATTACH: None}, id="no label"),
    ],
)
def test_a_pod_that_the_policy_cannot_attach_starts_as_it_is(
    policy: None, attached: Subject, containers: list[Json], labels: dict[str, str | None]
) -> None:
    made = _created(attached, "as-it-is", containers, **labels)

    assert "initContainers" not in made["spec"]
    assert [each.get("args") for each in made["spec"]["containers"]] == [each.get("args") for each in containers]


def test_the_policy_changes_no_pod_of_another_namespace(policy: None, attached: Subject) -> None:
    path = "/api/v1/namespaces/default/pods"
    content = _pod(attached, "elsewhere", [{"name": "vllm", "image": "vllm"}])

    made = _dry(attached, path, content)

    assert "initContainers" not in made["spec"]


@asynccontextmanager
async def _agent(registry: RegistryProcess, subject: Subject, pod: str) -> AsyncIterator[PodStream]:
    """The stream of a pod's agent, which reports again and again."""
    bound = {"kind": "Pod", "apiVersion": "v1", "name": pod, "uid": subject.get("Pod", pod)["metadata"]["uid"]}
    asked = {"spec": {"audiences": [_audience(subject)], "boundObjectRef": bound}}
    token = subject.api.create(subject.path("ServiceAccount", "default", "token"), asked)["status"]["token"]
    async with bearing(registry, token) as channel:
        stream = PodStream(channel, pod)
        stream.identity.speculator = subject.name
        await stream.report()
        await stream.receive()

        async def report() -> None:
            while True:
                await asyncio.sleep(_REPORT_S)
                await stream.report()

        async with asyncio.TaskGroup() as tasks:
            reporting = tasks.create_task(report())
            yield stream
            reporting.cancel()


def _pod(subject: Subject, name: str, containers: list[Json], **labels: str | None) -> Json:
    given = {**LABELS, names.ATTACH: subject.name, **labels}
    metadata = {"name": name, "labels": {key: value for key, value in given.items() if value is not None}}
    return {"metadata": metadata, "spec": {"containers": containers}}


def _created(subject: Subject, name: str, containers: list[Json], **labels: str | None) -> Json:
    """The pod as the API server would store it."""
    return _dry(subject, subject.path("Pod").rpartition("/")[0], _pod(subject, name, containers, **labels))


def _dry(subject: Subject, path: str, content: Json) -> Json:
    return subject.api.create(f"{path}?dryRun=All", content)


def _tried(subject: Subject) -> str:
    return json.dumps(_created(subject, "trial", [{"name": "vllm", "image": "vllm"}]))


def _plain(entry: Json) -> Json:
    """Without what the API server adds to a pod and not to a template."""
    mounts = [each for each in entry.get("volumeMounts", ()) if "serviceaccount" not in each["mountPath"]]
    return {**entry, **({"volumeMounts": mounts} if mounts else {})}


def _audience(subject: Subject) -> str:
    return f"updraft-registry/{subject.namespace}/{subject.name}"


def _is_going(pod: Json) -> bool:
    return "deletionTimestamp" in pod["metadata"]
