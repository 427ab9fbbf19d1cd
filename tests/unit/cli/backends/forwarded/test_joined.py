"""Reports of a registry complete what Kubernetes knows, and never overrule the resource."""

from dataclasses import replace

from tests.support.console import state

from updraft_cli.backends.forwarded.joined import joined
from updraft_cli.backends.snapshot import PodState, SpeculatorSnapshot
from updraft_cli.backends.speculators import MetricChange, Trial


def reported() -> SpeculatorSnapshot:
    return state(num_pods=2).speculators[0]


def ours() -> SpeculatorSnapshot:
    """The same as a cluster shows it: no versions of pods, no bounds, no traffic."""
    one = reported()
    change = MetricChange(candidate=2.75, stable=2.59, change_percent=6.2)
    trial = Trial(candidate=6, baseline=4, step=1, steps=2, acceptance_length=change)
    speculator = replace(one.speculator, trial=trial, traffic=(), learning=None, pinned=3)
    pods = tuple(
        PodState(name=pod.name, state="ready", node="node-1", requested_device="1 nvidia.com/gpu") for pod in one.pods
    )
    return replace(one, speculator=speculator, pods=pods, history=())


def test_pods_have_their_version_and_their_node() -> None:
    (first, second) = joined(ours(), reported()).pods
    assert (first.version, second.version) == (6, 4)
    assert (first.node, first.state) == ("node-1", "ready")
    assert (first.device, first.requested_device) == ("cpu", "1 nvidia.com/gpu")


def test_evidence_has_bounds_and_learning_its_figures() -> None:
    speculator = joined(ours(), reported()).speculator
    assert speculator.trial is not None
    assert speculator.trial.acceptance_length is not None
    assert speculator.trial.acceptance_length.low_percent == -0.4
    assert speculator.learning == reported().speculator.learning
    assert speculator.traffic == reported().speculator.traffic


def test_the_resource_decides_what_is_pinned_and_which_canary_runs() -> None:
    one = ours()
    later = replace(one, speculator=replace(one.speculator, candidate=0, trial=None))
    speculator = joined(later, reported()).speculator
    assert speculator.pinned == 3
    assert speculator.trial is None


def test_a_ready_pod_that_cannot_load_its_version_has_failed_and_one_that_is_not_ready_stays_so() -> None:
    refused = replace(
        reported(), pods=tuple(replace(pod, state="failed", problem="no space") for pod in reported().pods)
    )
    first, second = ours().pods
    unready = replace(ours(), pods=(first, replace(second, state="not ready", problem="it starts")))
    states = [(pod.state, pod.problem) for pod in joined(unready, refused).pods]
    assert states == [("failed", "no space"), ("not ready", "it starts")]


def test_pods_that_kubernetes_does_not_show_are_those_of_the_registry() -> None:
    forbidden = replace(ours(), pods=(), pods_problem="pods is forbidden")
    whole = joined(forbidden, reported())
    assert (whole.pods, whole.pods_problem) == (reported().pods, "")
