"""An import of another shape on SGLang, from its canary to all pods: with the registry's decisions, the operator's plans, and
pods that load only what has the shape that their server was built for.
"""

import json
from dataclasses import replace

import pytest
from tests.support.observed import as_child, connected, observed, version
from tests.support.rollouts import World, obeyed

from updraft.registry.v1 import registry_pb2 as pb
from updraft_operator.planning import lineage
from updraft_operator.planning.objects import Child, Ref
from updraft_operator.planning.plan import objects
from updraft_registry.rollout.placement import Pod
from updraft_rollouts.terms import Phase, Source

CONFIG = json.dumps({"hidden_size": 4096, "intermediate_size": 8192, "draft_vocab_size": 32_000})
PHASES = {Phase.CANARY: pb.PHASE_CANARY, Phase.STABLE: pb.PHASE_STABLE, Phase.ROLLED_BACK: pb.PHASE_ROLLED_BACK}


class Cluster:
    """SGLang pods without a draft. Version 1 is an import; `fits` says whether pods with the spec's sizes can load it."""

    def __init__(self, *, num_pods: int, fits: bool) -> None:
        self.world = World(num_pods)
        self.world.speculator = replace(self.world.speculator, versions=(), latest=0)
        self.world.pods = {name: Pod(name=name, boot="1") for name in self.world.pods}
        self.loadable = {"", CONFIG} if fits else {CONFIG}
        self.template, self.children = "", dict[Ref, Child]()
        self.built_for = dict.fromkeys(self.world.pods, "")
        self.num_restarts = 0
        self.reconcile()
        self.world.decide()
        self.world.publish(None, source=Source.IMPORTED)

    def run(self, seconds: int) -> None:
        """Each second the operator looks, at most one pod restarts, and the registry decides."""
        for _ in range(seconds):
            self.obey()
            self.reconcile()
            self.restart_one()
            self.world.decide(after_s=1)

    def obey(self) -> None:
        for name, pod in self.world.pods.items():
            order = self.world.decision.directives[name]
            if order.serve and self.built_for[name] not in self.loadable:
                trouble = "not yet: version 1 has another shape"
                self.world.pods[name] = replace(pod, trouble=trouble, waits_for_restart=order.serve)
            else:
                served = obeyed(pod, order, self.world.speculator.versions)
                self.world.pods[name] = replace(served, trouble="", waits_for_restart=0)

    def reconcile(self) -> None:
        versions = []
        for number, phase in self.world.phases.items():
            mirrored = version(number, PHASES[phase], source=pb.SOURCE_IMPORTED)
            mirrored.manifest.config_json = CONFIG
            versions.append(mirrored)
        spec = {"engine": {"type": "SGLang"}}
        seen = observed(spec, registry=connected(versions, pods=self.counts()), children=self.children)
        self.template = lineage.draft_config(seen)
        self.children = {child.ref: child for child in map(as_child, objects(seen))}

    def counts(self) -> pb.Pods:
        pods, num_serving = self.world.pods.values(), sum(pod.loaded == 1 for pod in self.world.pods.values())
        return pb.Pods(
            connected=len(pods),
            serving_stable=num_serving if self.world.stable else 0,
            serving_candidate=0 if self.world.stable else num_serving,
            waiting_for_restart=sum(pod.waits_for_restart == 1 for pod in pods),
        )

    def restart_one(self) -> None:
        outdated = [name for name, config in self.built_for.items() if config != self.template]
        for name in outdated[:1]:
            self.world.pods[name] = Pod(name=name, boot=f"of another template {len(outdated)}")
            self.built_for[name] = self.template
            self.num_restarts += 1


@pytest.mark.parametrize("num_pods", [1, 2, 16])
@pytest.mark.parametrize("fits", [False, True], ids=["of another shape", "of the shape that pods have"])
def test_an_import_goes_from_canary_to_stable_and_pods_restart_only_for_another_shape(
    num_pods: int, *, fits: bool
) -> None:
    cluster = Cluster(num_pods=num_pods, fits=fits)
    assert cluster.world.phases == {1: Phase.CANARY}
    cluster.run(60)
    cluster.world.see(gain_percent=40)
    cluster.run(400)
    assert cluster.world.phases == {1: Phase.STABLE}
    assert {pod.loaded for pod in cluster.world.pods.values()} == {1}
    assert (cluster.num_restarts, cluster.template) == ((0, "") if fits else (num_pods, CONFIG))
