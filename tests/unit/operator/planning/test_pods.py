"""What a pod's status says, as a reason that a person can act on."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.observed import pod

from updraft_operator.planning.pods import PodState, worst


def _body(status: dict[str, Any], **metadata: Any) -> dict[str, Any]:
    labels = {"app.kubernetes.io/component": "serving"}
    return {"metadata": {"name": "qwen-serving-1", "labels": labels, **metadata}, "status": status}


def _container(state: dict[str, Any], name: str = "inference", **more: Any) -> dict[str, Any]:
    return {"name": name, "image": "inference:1", "ready": False, "restartCount": 0, "state": state, **more}


def _waiting(reason: str, message: str = "") -> dict[str, Any]:
    return {"waiting": {"reason": reason, "message": message}}


def _ended(code: int, reason: str = "Error", message: str = "") -> dict[str, Any]:
    return {"terminated": {"exitCode": code, "reason": reason, "message": message}}


def _unscheduled(message: str) -> dict[str, Any]:
    return {"conditions": [{"type": "PodScheduled", "status": "False", "message": message}]}


@pytest.mark.parametrize(
    ("status", "reason", "said"),
    [
        pytest.param({}, None, "", id="just made"),
        pytest.param({"containerStatuses": [_container(_waiting("ContainerCreating"))]}, None, "", id="starts"),
        pytest.param({"containerStatuses": [_container({"running": {}})]}, None, "", id="loads"),
        pytest.param(
            _unscheduled("0/3 nodes are available: 3 Insufficient nvidia.com/gpu."),
            "InsufficientGPU",
            "3 Insufficient nvidia.com/gpu",
            id="no GPU",
        ),
        pytest.param(
            _unscheduled("0/3 nodes are available: 3 Insufficient cpu."), "Unschedulable", "cpu", id="no processor"
        ),
        pytest.param(
            _unscheduled("0/3 nodes are available: 3 node(s) had untolerated taint {nvidia.com/gpu: }."),
            "Unschedulable",
            "taint",
            id="a taint that is named after GPUs",
        ),
        pytest.param(
            _unscheduled("0/3 nodes are available: 3 Insufficient nvidia.com/mig-1g.10gb."),
            "InsufficientGPU",
            "mig-1g.10gb",
            id="no slice of a GPU",
        ),
        pytest.param(
            _unscheduled("0/3 nodes are available: 3 cannot allocate all claims. still not schedulable."),
            "ClaimNotAllocated",
            "cannot allocate all claims",
            id="no device for a claim",
        ),
        pytest.param(
            _unscheduled('waiting for dynamic resource controller to create the resourceclaim "qwen-gpus"'),
            "ClaimNotAllocated",
            "qwen-gpus",
            id="no claim",
        ),
        pytest.param(_unscheduled(""), "Unschedulable", "no node fits the pod yet", id="without a word"),
        *(
            pytest.param(
                {"containerStatuses": [_container(_waiting(reason, "not found"))]},
                "ImagePullBackOff",
                "inference:1: not found",
                id=reason,
            )
            for reason in ("ImagePullBackOff", "ErrImagePull", "InvalidImageName", "ErrImageNeverPull")
        ),
        *(
            pytest.param(
                {"containerStatuses": [_container(_waiting(reason, "no such secret"))]},
                "CreateContainerConfigError",
                "inference: no such secret",
                id=reason,
            )
            for reason in ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")
        ),
        pytest.param(
            {"containerStatuses": [_container(_ended(137, "OOMKilled"))]},
            "OOMKilled",
            "inference exceeded its memory limit",
            id="killed for memory",
        ),
        pytest.param(
            {
                "containerStatuses": [
                    _container(_waiting("CrashLoopBackOff"), lastState=_ended(137, "OOMKilled"), restartCount=3)
                ]
            },
            "OOMKilled",
            "memory",
            id="killed for memory again and again",
        ),
        pytest.param(
            {
                "containerStatuses": [
                    _container(
                        _waiting("CrashLoopBackOff"), lastState=_ended(1, message="a\n\nthe last\n"), restartCount=2
                    )
                ]
            },
            "CrashLoopBackOff",
            "inference exited with status 1: the last, 2 restarts",
            id="crashes, with its last words",
        ),
        pytest.param(
            {"containerStatuses": [_container(_ended(2))]},
            "CrashLoopBackOff",
            "inference exited with status 2",
            id="ended",
        ),
        pytest.param(
            {"containerStatuses": [_container({"running": {}}, lastState=_ended(1), restartCount=1)]},
            "CrashLoopBackOff",
            "1 restarts",
            id="runs again after a crash, and is not ready yet",
        ),
        pytest.param(
            {"containerStatuses": [_container({"running": {}}, lastState=_ended(1), restartCount=1, ready=True)]},
            None,
            "",
            id="recovered",
        ),
        pytest.param(
            {"containerStatuses": [_container({"running": {}}, lastState=_ended(0, "Completed"), restartCount=1)]},
            None,
            "",
            id="ended well before",
        ),
        pytest.param(
            {"initContainerStatuses": [_container(_ended(1, message="401 Unauthorized"), "model")]},
            "ModelDownloadFailed",
            "model exited with status 1: 401 Unauthorized",
            id="no model",
        ),
        pytest.param(
            {"initContainerStatuses": [_container(_ended(1, message="401 Unauthorized"), "updraft-model")]},
            "ModelDownloadFailed",
            "updraft-model exited with status 1: 401 Unauthorized",
            id="no model in a pod of another workload",
        ),
        pytest.param(
            {"initContainerStatuses": [_container(_waiting("ErrImagePull", "denied"), "model")]},
            "ImagePullBackOff",
            "denied",
            id="no image of the download",
        ),
        pytest.param(
            {"initContainerStatuses": [_container(_ended(1), "mine")]},
            "CrashLoopBackOff",
            "mine exited",
            id="an init container of the user's",
        ),
        pytest.param(
            {
                "initContainerStatuses": [
                    _container(
                        _waiting("CrashLoopBackOff"),
                        "inference",
                        restartCount=1,
                        lastState=_ended(2, message="no model"),
                    )
                ]
            },
            "CrashLoopBackOff",
            "inference exited with status 2: no model",
            id="a sidecar that does not stay",
        ),
        pytest.param(
            {
                "initContainerStatuses": [
                    _container({"running": {}}, "inference", lastState=_ended(2), ready=True, restartCount=3)
                ]
            },
            None,
            "",
            id="a sidecar that runs again",
        ),
        pytest.param(
            {"phase": "Failed", "reason": "Evicted", "message": "low on memory"},
            "CrashLoopBackOff",
            "Evicted: low on memory",
            id="evicted",
        ),
    ],
)
def test_a_pods_trouble_has_a_reason_and_words(status: dict[str, Any], reason: str | None, said: str) -> None:
    problem = PodState.of(_body(status)).problem
    assert (problem.reason if problem else None) == reason
    assert problem is None or said in problem.message


def test_a_pod_is_ready_when_its_condition_says_so() -> None:
    assert PodState.of(_body({"conditions": [{"type": "Ready", "status": "True"}]})).is_ready
    assert not PodState.of(_body({"conditions": [{"type": "Ready", "status": "False"}]})).is_ready
    assert not PodState.of(_body({})).is_ready


def test_a_pod_that_is_told_to_go_is_ending() -> None:
    assert PodState.of(_body({}, deletionTimestamp="2026-11-25T12:00:00Z")).is_ending


def test_a_pod_whose_containers_ended_for_good_is_finished() -> None:
    phases = ("Pending", "Running", "Failed", "Succeeded")
    finished = [phase for phase in phases if PodState.of(_body({"phase": phase})).is_finished]
    assert finished == ["Failed", "Succeeded"]


def test_the_last_word_of_a_pod_that_ended_well_is_its_result() -> None:
    well = PodState.of(_body({"containerStatuses": [_container(_ended(0, "Completed", '{"x": 1}'))]}))
    badly = PodState.of(_body({"containerStatuses": [_container(_ended(1, message='{"x": 1}'))]}))
    assert (well.result, badly.result) == ('{"x": 1}', "")


def test_the_worst_of_pods_is_the_first_by_name_that_stays() -> None:
    pods = [
        pod("c", problem=("OOMKilled", "c")),
        pod("a", problem=("Unschedulable", "a"), is_ending=True),
        pod("b", problem=("CrashLoopBackOff", "b")),
        pod("0", is_ready=True),
    ]
    failing = worst(pods)
    assert failing is not None
    assert failing[0].name == "b"
    assert worst(reversed(pods)) == failing
    assert worst([]) is None


SCHEDULED = {"conditions": [{"type": "PodScheduled", "status": "True"}]}
states = st.one_of(
    st.just({}),
    st.builds(_waiting, st.sampled_from(["", "ErrImagePull", "CrashLoopBackOff", "PodInitializing"]), st.text()),
    st.builds(_ended, st.integers(0, 255), st.sampled_from(["Error", "OOMKilled", "Completed"]), st.text()),
)
containers = st.builds(
    _container,
    states,
    st.sampled_from(["inference", "model"]),
    restartCount=st.integers(0, 9),
    lastState=states,
    ready=st.booleans(),
)
statuses = st.fixed_dictionaries(
    {},
    optional={
        "phase": st.sampled_from(["Pending", "Running", "Failed"]),
        "reason": st.text(),
        "containerStatuses": st.lists(containers, max_size=2),
        "initContainerStatuses": st.lists(containers, max_size=2),
        "conditions": st.builds(lambda text: _unscheduled(text)["conditions"], st.text()),
    },
)


@given(status=statuses)
def test_whatever_a_kubelet_writes_is_read(status: dict[str, Any]) -> None:
    problem = PodState.of(_body(status)).problem
    assert problem is None or problem.message


def test_a_pod_whose_container_restarted_is_ready_but_has_no_time_of_its_start() -> None:
    ready = {"type": "Ready", "status": "True", "lastTransitionTime": "2026-11-25T12:01:30Z"}
    status = {"conditions": [ready], "containerStatuses": [_container({"running": {}}, ready=True, restartCount=1)]}
    state = PodState.of(_body(status, creationTimestamp="2026-11-25T12:00:00Z"))
    assert state.created_s is not None
    assert state.ready_s == state.created_s + 90
    assert state.startup_s is None


_MADE = {"resourceClaimStatuses": [{"name": "gpus"}]}


@pytest.mark.parametrize(
    ("claim", "status", "says"),
    [
        pytest.param("TemplateName", {}, "ResourceClaimTemplate none", id="the scheduler has said nothing"),
        pytest.param("TemplateName", _MADE, "", id="its claim is made"),
        pytest.param("TemplateName", SCHEDULED, "", id="it has a node"),
        pytest.param("Name", {}, "ResourceClaim none", id="a claim by name"),
        pytest.param("Name", _MADE, "ResourceClaim none", id="a claim by name beside one that is made"),
        pytest.param("Name", SCHEDULED, "", id="a node and a claim by name"),
    ],
)
def test_a_pod_that_the_scheduler_has_not_seen_may_lack_its_claim(
    claim: str, status: dict[str, Any], says: str
) -> None:
    spec = {"resourceClaims": [{"name": "gpus", f"resourceClaim{claim}": "none"}]}
    problem = PodState.of({**_body(status), "spec": spec}).problem
    assert (problem is not None) == bool(says)
    assert problem is None or (problem.reason == "ClaimNotAllocated" and says in problem.message)


@pytest.mark.parametrize(
    ("gates", "labels", "reason", "said"),
    [
        pytest.param(
            ["kueue.x-k8s.io/admission"],
            {"kueue.x-k8s.io/queue-name": "team-a"},
            "Queued",
            "Kueue has not admitted it yet (team-a; gates kueue.x-k8s.io/admission)",
            id="no quota",
        ),
        pytest.param(
            ["kueue.x-k8s.io/topology"],
            {},
            "Queued",
            "Kueue has not admitted it yet (no queue; gates kueue.x-k8s.io/topology)",
            id="no place in the topology",
        ),
        pytest.param(
            ["example.com/quota"],
            {},
            "SchedulingGated",
            "it waits for the removal of gates example.com/quota",
            id="a gate of somebody else",
        ),
    ],
)
def test_a_pod_that_the_scheduler_does_not_see_names_its_gates(
    gates: list[str], labels: dict[str, str], reason: str, said: str
) -> None:
    body = _body(_unscheduled("Scheduling is blocked due to non-empty scheduling gates"))
    body["metadata"]["labels"] |= labels
    body["spec"] = {"schedulingGates": [{"name": gate} for gate in gates]}
    problem = PodState.of(body).problem
    assert problem is not None
    assert (problem.reason, problem.message) == (reason, said)
