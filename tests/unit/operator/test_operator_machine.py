"""Everything that can happen around a speculator, in any order, and what must hold after each settling all the same.

People change the spec, turn, delete and occupy objects; kubelets say what they like of pods; the registry publishes,
tries, promotes, condemns, forgets, and is away; operators are replaced in between.
"""

import json
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tests.support.observed import is_empty, traffic
from tests.unit.operator.memory_cluster import Where, place
from tests.unit.operator.world import CONDEMNED, KEY, OWNER, WAITING, World

from updraft.registry.v1 import registry_pb2 as pb
from updraft_operator.api import names
from updraft_operator.api.draft_import import DraftImport
from updraft_operator.manifests.manifest import Manifest
from updraft_operator.planning import imports
from updraft_operator.planning.plan import objects
from updraft_operator.planning.policy import is_followed

ready = {"conditions": [{"type": "Ready", "status": "True"}]}
pod_statuses = st.sampled_from(
    [
        None,
        {},
        ready,
        {"conditions": [{"type": "PodScheduled", "status": "False", "message": "Insufficient nvidia.com/gpu"}]},
        {"containerStatuses": [{"name": "x", "state": {"waiting": {"reason": "ErrImagePull", "message": "x"}}}]},
        {
            "containerStatuses": [
                {
                    "name": "x",
                    "restartCount": 2,
                    "state": {"waiting": {"reason": "CrashLoopBackOff"}},
                    "lastState": {"terminated": {"exitCode": 1, "reason": "Error", "message": "x"}},
                }
            ]
        },
    ]
)
numbers = st.integers(1, 3)
workload = st.sampled_from(
    [
        {"env": [{"name": "X", "value": "1"}]},
        {"env": []},
        {"resources": {"requests": {"cpu": "1000m"}}},
        {"podTemplate": {"spec": {"nodeSelector": {"gpu": "yes"}}}},
        {
            "podTemplate": {
                "metadata": None,
                "spec": {"tolerations": [{"key": "a"}, {"key": "a", "effect": "NoExecute"}]},
            }
        },
        {"podTemplate": None},
    ]
)
specs = st.one_of(
    st.builds(lambda part, spec: {part: spec}, st.sampled_from(["serving", "trainer", "registry"]), workload),
    st.builds(
        lambda part, image: {part: {"image": image}},
        st.sampled_from(["engine", "trainer", "registry"]),
        st.sampled_from(["mine:1", None]),
    ),
    st.builds(lambda n: {"serving": {"replicas": n}}, st.integers(0, 3)),
    st.builds(lambda n: {"rollout": {"promotedVersion": n}}, st.none() | numbers),
    st.builds(lambda is_on: {"rollout": {"paused": is_on}}, st.booleans()),
    st.builds(lambda n: {"rollout": {"revisionHistoryLimit": n}}, numbers),
    st.builds(lambda how: {"rollout": {"strategy": how}}, st.sampled_from(["Canary", "Immediate", "Manual"])),
    st.builds(lambda is_on: {"suspend": is_on}, st.booleans()),
    st.builds(lambda is_on: {"traces": {"enabled": is_on}}, st.booleans()),
    st.builds(lambda name: {"traces": {"redis": name}}, st.sampled_from([None, {"urlSecretRef": {"name": "mine"}}])),
    st.builds(lambda how: {"engine": {"type": how}}, st.sampled_from(["Torch", "SGLang", "VLLM"])),
    st.builds(lambda how: {"deletionPolicy": how}, st.sampled_from(["Retain", "Delete"])),
)
edits = st.sampled_from(
    [
        lambda body: body["metadata"].pop("labels", None),
        lambda body: body["metadata"].get("labels", {}).pop(names.SPECULATOR, None),
        lambda body: body["metadata"].get("labels", {}).update(team="mine"),
        lambda body: body["metadata"].pop("annotations", None),
        lambda body: body["metadata"].pop("ownerReferences", None),
        lambda body: body.get("data", {}).clear(),
        lambda body: body.get("data", {}).update(UPDRAFT_X="1"),
        lambda body: body.get("spec", {}).update(replicas=9),
        lambda body: body.get("spec", {}).get("template", {}).get("spec", {}).pop("enableServiceLinks", None),
        lambda body: body.get("spec", {}).get("template", {}).get("spec", {}).pop("automountServiceAccountToken", None),
        lambda body: body.get("spec", {}).get("template", {}).get("spec", {}).update(hostname="x"),
    ]
)
_HANDS_OFF = ("Secret", "Job", "PersistentVolumeClaim", "DraftVersion", "DraftImport")
"""What is looked at once a minute, or made once: other tests turn those."""


class Speculators(RuleBasedStateMachine):
    """One speculator's life."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.foreign: dict[Where, Manifest] = {}
        self.world.settle()
        self.world.starts_registry()
        self.world.registry.move(self.world.registry.publish(), pb.PHASE_STABLE)
        self.world.settle()

    def _did(self) -> None:
        self.world.settle()

    def _children(self) -> list[Where]:
        return sorted(
            where
            for where, each in self.world.cluster.objects.items()
            if where not in self.foreign
            and where[0] not in (*_HANDS_OFF, "Event", "Pod", OWNER[0])
            and each["metadata"].get("labels", {}).get(names.MANAGED_BY) == names.MANAGER
        )

    # People

    @rule(change=specs)
    def change_the_spec(self, change: dict[str, Any]) -> None:
        self.world.spec(**change)
        self._did()

    @rule(number=st.none() | st.integers(0, 4))
    def pin(self, number: int | None) -> None:
        self.world.spec(rollout={"pinnedVersion": "NoDraft" if number == 0 else number})
        self._did()

    @rule(data=st.data(), edit=edits)
    def turn_an_object(self, data: st.DataObject, edit: Any) -> None:
        self.world.cluster.edit(data.draw(st.sampled_from(self._children())), edit)
        self._did()

    @rule(data=st.data())
    def delete_an_object(self, data: st.DataObject) -> None:
        self.world.cluster.remove(data.draw(st.sampled_from(self._children())))
        self._did()

    @precondition(lambda self: len(self.foreign) < 3)
    @rule(data=st.data())
    def occupy_a_name(self, data: st.DataObject) -> None:
        where = data.draw(st.sampled_from(self._children()))
        self.world.cluster.remove(where)
        metadata = {"name": where[2], "namespace": where[1], "labels": {"app": "theirs"}}
        self.world.cluster.set({"kind": where[0], "metadata": metadata, "spec": {}, "data": {"theirs": "x"}})
        self.foreign[where] = deepcopy(self.world.cluster.objects[where])
        self._did()

    @precondition(lambda self: self.foreign)
    @rule(data=st.data())
    def free_a_name(self, data: st.DataObject) -> None:
        where = data.draw(st.sampled_from(sorted(self.foreign)))
        del self.foreign[where]
        self.world.cluster.remove(where)
        self.world.reconciler.look_again()
        self._did()

    @rule(number=numbers, is_on=st.booleans())
    def retain_a_version(self, number: int, *, is_on: bool) -> None:
        where = ("DraftVersion", KEY.namespace, names.draft_version(KEY.name, number))
        if where in self.world.cluster.objects:
            self.world.cluster.edit(where, lambda body: body["spec"].update(retain=is_on))
        self._did()

    @rule(number=numbers)
    def delete_a_mirror(self, number: int) -> None:
        where = ("DraftVersion", KEY.namespace, names.draft_version(KEY.name, number))
        if where in self.world.cluster.objects:
            self.world.cluster.remove(where)
        self._did()

    @rule(name=st.sampled_from(["mine", "yours"]))
    def bring_a_draft(self, name: str) -> None:
        spec = {"speculatorRef": {"name": KEY.name}, "uri": "hf://org/draft"}
        if ("DraftImport", KEY.namespace, name) not in self.world.cluster.objects:
            metadata = {"name": name, "namespace": KEY.namespace}
            self.world.cluster.set({"kind": "DraftImport", "metadata": metadata, "spec": spec})
        self._did()

    @rule(name=st.sampled_from(["mine", "yours"]))
    def take_an_import_back(self, name: str) -> None:
        where = ("DraftImport", KEY.namespace, name)
        if where in self.world.cluster.objects:
            self.world.cluster.remove(where)
        self._did()

    @rule(name=st.sampled_from(["mine", "yours"]), fails=st.booleans())
    def end_an_import(self, name: str, *, fails: bool) -> None:
        body = self.world.cluster.objects.get(("DraftImport", KEY.namespace, name))
        if body is None:
            return
        owner = self.world.store.cached(KEY).speculator
        assert owner is not None
        job = imports.job_name(owner, DraftImport.model_validate(body))
        where = ("Job", KEY.namespace, job)
        if where not in self.world.cluster.objects:
            return
        if fails:
            failed = {"conditions": [{"type": "Failed", "status": "True", "message": "x"}]}
            self.world.cluster.edit(where, lambda body: body.update(status=failed))
        else:
            number = self.world.registry.publish(source=pb.SOURCE_IMPORTED)
            told = {"version": number, "digest": self.world.registry.versions[number].manifest.digest}
            ended = {"terminated": {"exitCode": 0, "message": json.dumps(told)}}
            metadata = {
                "name": f"{job}-x",
                "uid": f"{job}-x",
                "namespace": KEY.namespace,
                "labels": names.labels(KEY.name, names.IMPORT),
                "ownerReferences": [{"uid": self.world.cluster.objects[where]["metadata"]["uid"]}],
            }
            status = {"phase": "Succeeded", "containerStatuses": [{"name": "import", "state": ended}]}
            self.world.cluster.set({"kind": "Pod", "metadata": metadata, "status": status})
            complete = {"conditions": [{"type": "Complete", "status": "True"}]}
            self.world.cluster.edit(where, lambda body: body.update(status=complete))
        self._did()

    # Kubernetes

    @rule(part=st.sampled_from(["serving", "trainer", "registry"]), number=st.integers(1, 2), status=pod_statuses)
    def a_pod_says(self, part: str, number: int, status: Manifest | None) -> None:
        self.world.pod(part, number, status)
        self._did()

    @rule(is_ready=st.sampled_from([True, True, False]))
    def the_registry_starts_or_stops(self, *, is_ready: bool) -> None:
        if ("StatefulSet", KEY.namespace, f"{KEY.name}-registry") not in self.foreign:
            self.world.starts_registry(is_ready=is_ready)
        self._did()

    @rule(seconds=st.sampled_from([1.0, 31.0, 61.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.clock.advance(seconds)
        self._did()

    @rule()
    def another_operator_takes_over(self) -> None:
        before = len(self.world.cluster.writes)
        self.world.restart()
        self._did()
        status_s = self.world.cluster.writes[before:]
        assert all(verb == "apply" and kind in (OWNER[0], "DraftVersion", "DraftImport") for verb, kind, _ in status_s)

    # The registry, whose doings never touch a pod

    def _in_the_registry(self, happens: Any) -> None:
        before = self._templates()
        happens()
        self._did()
        assert self._templates() == before

    def _templates(self) -> Mapping[Where, Manifest]:
        objects = self.world.cluster.objects
        return {where: deepcopy(each["spec"]["template"]) for where, each in objects.items() if _has_pods(where, each)}

    @rule()
    def the_trainer_publishes(self) -> None:
        if self.world.registry.latest < 5:
            self._in_the_registry(self.world.registry.publish)

    @rule(number=numbers, phase=st.sampled_from([pb.PHASE_CANARY, pb.PHASE_STABLE, *CONDEMNED]))
    def a_version_moves(self, number: int, phase: "pb.Phase.ValueType") -> None:
        kept = self.world.registry.versions.get(number)
        if kept is not None and kept.phase not in CONDEMNED and self.world.registry.pinned is None:
            self._in_the_registry(lambda: self.world.registry.move(number, phase))

    @rule(number=numbers)
    def a_version_is_forgotten(self, number: int) -> None:
        kept = self.world.registry.versions.get(number)
        is_in_use = kept is None or kept.retain or kept.phase in (pb.PHASE_STABLE, *WAITING)
        if not is_in_use and number != self.world.registry.pinned:
            self._in_the_registry(lambda: self.world.registry.versions.pop(number))

    @rule(length=st.sampled_from([1.0, 2.0, 2.5]), number=numbers)
    def pods_serve(self, length: float, number: int) -> None:
        if number in self.world.registry.versions:
            self._in_the_registry(lambda: self.world.registry.traffic.update({number: traffic(number, length)}))

    @rule(is_away=st.booleans())
    def the_registry_is_away_or_back(self, *, is_away: bool) -> None:
        """While it is away it may forget versions: nobody hears of it, and nothing is deleted."""
        drafts = self.world.drafts().keys()
        self.world.registry.is_away = is_away
        self._in_the_registry(lambda: None)
        assert not is_away or self.world.drafts().keys() == drafts

    @rule(number=numbers)
    def somebody_pins_behind_the_operators_back(self, number: int) -> None:
        kept = self.world.registry.versions.get(number)
        if kept is not None and kept.phase not in CONDEMNED:
            self.world.registry.pinned = number
            self._in_the_registry(lambda: self.world.registry.move(number, pb.PHASE_STABLE))

    # What always holds

    @invariant()
    def nothing_is_left_to_do(self) -> None:
        assert is_empty(self.world.plan())

    @invariant()
    def every_object_is_as_it_is_wished(self) -> None:
        observation = self.world.observe()
        assert observation is not None
        for each in objects(observation):
            if place(each) not in self.foreign and each["kind"] not in _HANDS_OFF:
                assert self.world.cluster.holds(each), place(each)

    @invariant()
    def what_is_foreign_is_as_it_was(self) -> None:
        for where, body in self.foreign.items():
            assert self.world.cluster.objects[where] == body

    @invariant()
    def every_kept_version_has_an_object_and_no_other_has_one(self) -> None:
        if not self._is_connected:
            return
        assert {each["spec"]["version"] for each in self.world.drafts().values()} == self.world.registry.versions.keys()

    @invariant()
    def the_registry_does_what_the_spec_says(self) -> None:
        if not self._is_connected:
            return
        registry, owner = self.world.registry, self.world.store.cached(KEY).speculator
        assert owner is not None
        rollout = owner.spec.rollout
        assert is_followed(self.world.desired(), registry.policy)
        assert registry.is_paused == rollout.paused or not registry.versions
        if rollout.pinned is None:
            assert registry.pinned is None
        elif self._can_be_served(rollout.pinned):
            assert registry.pinned == rollout.pinned

    @invariant()
    def the_finalizer_is_there_exactly_where_it_is_needed(self) -> None:
        owner = self.world.cluster.objects[OWNER]
        needs_it = owner["spec"].get("deletionPolicy") == "Delete"
        assert (names.FINALIZER in owner["metadata"].get("finalizers", ())) is needs_it

    @invariant()
    def conditions_are_of_the_spec_as_it_is(self) -> None:
        owner = self.world.cluster.objects[OWNER]
        assert owner["status"]["observedGeneration"] == owner["metadata"]["generation"]

    @property
    def _is_connected(self) -> bool:
        observation = self.world.observe()
        return observation is not None and observation.registry.is_connected

    def _can_be_served(self, number: int) -> bool:
        kept = self.world.registry.versions
        return bool(kept) if number == 0 else number in kept and kept[number].phase not in CONDEMNED


def _has_pods(where: Where, body: Manifest) -> bool:
    return where[0] in ("Deployment", "StatefulSet") and "template" in body.get("spec", {})


TestSpeculators = Speculators.TestCase
_IS_SAME = settings().derandomize
TestSpeculators.settings = settings(
    max_examples=20 if _IS_SAME else 500,
    stateful_step_count=25,
    deadline=None,
    # To make a failure small takes minutes: `make fuzz` does it.
    phases=(Phase.explicit, Phase.generate) if _IS_SAME else tuple(Phase),
)
