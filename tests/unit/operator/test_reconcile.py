"""Observe, plan, carry out, in a small world: after a few looks nothing is left to do, and nothing foreign was touched."""

import base64
from dataclasses import replace
from typing import Any

import pytest
from tests.support.manifests import CONFIG
from tests.support.observed import is_empty, traffic
from tests.unit.operator.memory_cluster import Where
from tests.unit.operator.world import KEY, OWNER, World, run_now

from updraft.registry.v1 import registry_pb2 as pb
from updraft_chassis.errors import InvalidInput, Unavailable
from updraft_operator.api import names
from updraft_operator.manifests.manifest import Manifest
from updraft_operator.manifests.redis_users import Role
from updraft_operator.manifests.tls.terms import Tls, TlsMode
from updraft_operator.planning.assessment import unknown
from updraft_operator.planning.objects import Ref
from updraft_operator.planning.observed import ConnectionState
from updraft_operator.planning.runtime.upgrade import Stage, Upgrade

READY = {"conditions": [{"type": "Ready", "status": "True"}]}


def _where(kind: str, name: str) -> Where:
    return kind, KEY.namespace, name


@pytest.fixture
def world() -> World:
    """One that is settled, with a registry that answers and one version that serves."""
    made = World()
    made.settle()
    made.starts_registry()
    made.registry.move(made.registry.publish(), pb.PHASE_STABLE)
    made.settle()
    return made


def _condition(world: World, kind: str) -> tuple[str, str]:
    conditions = world.cluster.objects[OWNER]["status"]["conditions"]
    (condition,) = (each for each in conditions if each["type"] == kind)
    return condition["status"], condition["reason"]


def test_a_resource_alone_makes_its_objects_and_then_nothing_more() -> None:
    world = World()
    world.settle()
    kinds = [kind for _, kind, _ in world.cluster.writes]
    assert kinds.count("Deployment") == 2
    assert kinds.count("Secret") == 2
    assert kinds.count("AdaptiveSpeculator") == 1
    assert is_empty(world.plan())


def test_another_operator_finds_nothing_to_do(world: World) -> None:
    world.restart()
    world.reconciler.look_again()
    before = len(world.cluster.writes)
    world.settle()
    assert world.cluster.writes[before:] == []
    assert is_empty(world.plan())


def test_an_object_that_vanishes_keeps_the_others_from_nothing(world: World) -> None:
    for _ in range(3):
        world.registry.publish()
    world.settle()
    world.registry.move(2, pb.PHASE_REJECTED)
    world.registry.move(3, pb.PHASE_REJECTED)
    world.cluster.watchers.clear()  # nobody has told yet that this one is gone
    world.cluster.remove(_where("DraftVersion", "qwen-v2"))

    run_now(world.reconciler.reconcile(KEY))

    assert world.drafts()["qwen-v3"]["status"]["phase"] == "Rejected"
    rejected = [each["involvedObject"]["name"] for each in world.cluster.of("Event") if each["reason"] == "Rejected"]
    assert rejected == ["qwen-v3"]


def test_a_deletion_does_not_reach_another_object_of_the_same_name(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.registry.publish()
    world.settle()
    draft, delete = _where("DraftVersion", "qwen-v2"), world.cluster.delete
    seen = world.cluster.objects[draft]

    async def is_replaced_before(kind: str, namespace: str, name: str, uid: str) -> None:
        world.cluster.remove(draft)
        world.cluster.set(seen)
        await delete(kind, namespace, name, uid)

    monkeypatch.setattr(world.cluster, "delete", is_replaced_before)
    del world.registry.versions[2]
    run_now(world.reconciler.reconcile(KEY))

    assert ("delete", "DraftVersion", "qwen-v2") in world.cluster.writes
    assert world.cluster.objects[draft]["metadata"]["uid"] != seen["metadata"]["uid"]
    cached = {each.metadata.name: each.metadata.uid for each in world.store.cached(KEY).drafts}
    assert cached["qwen-v2"] == world.cluster.objects[draft]["metadata"]["uid"]


def test_an_object_that_was_not_observed_is_not_deleted(world: World) -> None:
    observed = world.observe()
    assert observed is not None
    with pytest.raises(KeyError):
        observed.identity(Ref("Deployment", "another"))


def test_a_secret_that_is_refused_changes_no_pod_template_again_and_again() -> None:
    world = World()
    taken = {"name": "qwen-redis-writer", "namespace": KEY.namespace, "labels": {}}
    world.cluster.set({"kind": "Secret", "metadata": taken, "data": {}})
    world.settle()
    for _ in range(3):
        world.clock.advance(61.0)
        world.reconciler.look_again()
        world.settle()
    assert [name for verb, kind, name in world.cluster.writes if kind == "Deployment"].count("qwen-serving") == 1


def test_versions_are_mirrored_and_told(world: World) -> None:
    world.registry.publish()
    world.settle()
    phases = {name: each["status"]["phase"] for name, each in world.drafts().items()}
    assert phases == {"qwen-v1": "Stable", "qwen-v2": "Pending"}
    assert is_empty(world.plan())


@pytest.mark.parametrize(
    ("where", "change"),
    [
        pytest.param(
            _where("Deployment", "qwen-serving"), lambda body: body["spec"].update(replicas=7), id="scaled by a person"
        ),
        pytest.param(
            _where("Deployment", "qwen-serving"),
            lambda body: body["spec"]["template"]["spec"].pop("automountServiceAccountToken"),
            id="a field taken away",
        ),
        pytest.param(_where("ConfigMap", "qwen-serving"), lambda body: body.update(data={}), id="settings taken away"),
        pytest.param(_where("ConfigMap", "qwen-serving"), lambda body: body["metadata"].pop("labels"), id="labels"),
        pytest.param(
            _where("Service", "qwen"), lambda body: body["metadata"]["labels"].pop(names.SPECULATOR), id="the label"
        ),
        pytest.param(
            _where("Service", "qwen"), lambda body: body["metadata"].pop("ownerReferences"), id="the owner reference"
        ),
        pytest.param(_where("Service", "qwen"), lambda body: body["metadata"].pop("annotations"), id="the mark"),
    ],
)
def test_what_somebody_turns_is_set_right(world: World, where: Where, change: Any) -> None:
    before = world.cluster.objects[where]
    world.cluster.edit(where, change)
    world.settle()
    after = world.cluster.objects[where]
    for field in ("spec", "data"):
        assert after.get(field) == before.get(field)
    assert after["metadata"]["labels"] == before["metadata"]["labels"]
    assert after["metadata"]["ownerReferences"] == before["metadata"]["ownerReferences"]
    assert is_empty(world.plan())


def test_what_others_add_stays(world: World) -> None:
    where = _where("Deployment", "qwen-serving")

    def add(body: Manifest) -> None:
        body["metadata"]["labels"]["team"] = "mine"
        body["spec"]["template"]["spec"]["containers"].append({"name": "mesh", "image": "mesh:1"})

    world.cluster.edit(where, add)
    before = len(world.cluster.writes)
    world.settle()
    assert world.cluster.writes[before:] == []
    assert world.cluster.objects[where]["metadata"]["labels"]["team"] == "mine"


def test_a_field_that_is_no_longer_wished_is_taken_away(world: World) -> None:
    where = _where("Deployment", "qwen-serving")
    world.spec(serving={"podTemplate": {"spec": {"hostname": "x"}}})
    world.settle()
    assert world.cluster.objects[where]["spec"]["template"]["spec"]["hostname"] == "x"
    world.spec(serving={"podTemplate": None})
    world.settle()
    assert "hostname" not in world.cluster.objects[where]["spec"]["template"]["spec"]


def _foreign(kind: str, name: str, **metadata: Any) -> Manifest:
    return {
        "kind": kind,
        "metadata": {"name": name, "namespace": KEY.namespace, **metadata},
        "data": {"theirs": "eHh4"},
    }


@pytest.mark.parametrize(
    "foreign",
    [
        pytest.param(_foreign("ConfigMap", "qwen-serving"), id="without an owner"),
        pytest.param(
            _foreign("ConfigMap", "qwen-serving", ownerReferences=[{"kind": "App", "name": "a", "uid": "u"}]),
            id="of an owner that does not control it",
        ),
        pytest.param(
            _foreign(
                "ConfigMap",
                "qwen-serving",
                labels=names.labels(KEY.name, names.SERVING),
                ownerReferences=[{"kind": "App", "name": "a", "uid": "u", "controller": True}],
            ),
            id="of another controller, with our labels",
        ),
        pytest.param(_foreign("Secret", "qwen-redis-writer"), id="a Secret"),
        pytest.param(
            {**_foreign("DraftVersion", "qwen-v1"), "spec": {"speculatorRef": {"name": "another"}, "version": 1}},
            id="a version of another speculator",
        ),
    ],
)
def test_a_foreign_object_is_refused_and_left_alone(foreign: Manifest) -> None:
    world = World()
    world.cluster.set(foreign)
    world.registry.publish()
    world.settle()
    world.starts_registry()
    world.settle()
    where = _where(foreign["kind"], foreign["metadata"]["name"])
    assert world.cluster.objects[where]["data"] == {"theirs": "eHh4"}
    if foreign["kind"] != "DraftVersion" or world.registry.calls:
        assert _condition(world, "Accepted") == ("False", "NameConflict")
    assert is_empty(world.plan())
    world.cluster.remove(where)
    world.clock.advance(61.0)
    world.reconciler.look_again()
    world.settle()
    world.starts_registry()
    world.settle()
    assert _condition(world, "Accepted") == ("True", "SpecAccepted")
    assert "theirs" not in world.cluster.objects[where].get("data", {})


def test_a_refused_write_is_said_until_it_is_tried_again() -> None:
    world = World()
    foreign = _foreign("Secret", "qwen-redis-writer")
    world.cluster.set(foreign)
    world.settle()
    world.cluster.remove(_where("Secret", "qwen-redis-writer"))
    world.clock.advance(61.0)
    world.reconciler.look_again()
    run_now(world.reconciler.refresh(KEY))
    assert _condition(world, "Accepted") == ("False", "NameConflict")
    run_now(world.reconciler.reconcile(KEY))
    assert _condition(world, "Accepted") == ("True", "SpecAccepted")


def test_a_refused_write_is_said_while_secrets_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    world.cluster.set(_foreign("Secret", "qwen-redis-writer"))
    world.settle()
    world.clock.advance(61.0)
    world.reconciler.look_again()

    async def fails(kind: str, namespace: str, name: str) -> Manifest:
        raise Unavailable(f"{kind} {name} is not answered")

    with monkeypatch.context() as patched:
        patched.setattr(world.cluster, "get", fails)
        with pytest.raises(Unavailable, match="is not answered"):
            run_now(world.reconciler.reconcile(KEY))
        run_now(world.reconciler.refresh(KEY))
    assert _condition(world, "Accepted") == ("False", "NameConflict")


def test_an_orphan_with_our_label_is_taken_in() -> None:
    world = World()
    world.cluster.set(_foreign("ConfigMap", "qwen-serving", labels=names.labels(KEY.name, names.SERVING)))
    world.settle()
    content = world.cluster.objects[_where("ConfigMap", "qwen-serving")]
    assert content["metadata"]["ownerReferences"][0]["name"] == KEY.name
    assert "UPDRAFT_INFERENCE_PORT" in content["data"]


def test_a_registry_that_is_away_costs_nothing_but_a_condition(world: World) -> None:
    world.registry.publish()
    world.settle()
    world.registry.is_away = True
    del world.registry.versions[1]
    world.spec(rollout={"pinnedVersion": 2})
    world.settle()
    assert _condition(world, "RegistryReady") == ("False", ConnectionState.UNREACHABLE.value)
    assert world.drafts().keys() == {"qwen-v1", "qwen-v2"}
    assert not world.registry.state().HasField("pinned")
    world.registry.is_away = False
    world.settle()
    assert world.registry.pinned == 2
    assert world.drafts().keys() == {"qwen-v2"}


def test_measurements_are_written_twice_a_minute_at_most(world: World) -> None:
    world.clock.advance(31.0)
    world.registry.traffic[1] = traffic(1, 2.0)
    world.settle()  # from too few samples to effective: news
    before = len(world.cluster.writes)
    for length in (2.1, 2.2, 2.3):
        world.clock.advance(5.0)
        world.registry.traffic[1] = traffic(1, length)
        world.settle()
    assert world.cluster.writes[before:] == []
    world.clock.advance(16.0)
    world.settle()
    assert world.cluster.objects[OWNER]["status"]["acceptance"]["stable"] == "2.30"
    assert world.drafts()["qwen-v1"]["status"]["acceptance"] == {"length": "2.30"}


def test_a_change_of_a_condition_is_one_event(world: World) -> None:
    before = len(world.cluster.of("Event"))
    world.pod(names.SERVING, 1, READY)
    world.settle()
    world.clock.advance(5.0)
    world.settle()
    reasons = [each["reason"] for each in world.cluster.of("Event")[before:]]
    assert sorted(reasons) == ["PodsReady", "Ready"]


def test_a_deleted_resource_leaves_nothing_behind(world: World) -> None:
    world.spec(deletionPolicy="Delete", traces={"enabled": False})
    world.settle()
    assert world.cluster.objects[OWNER]["metadata"]["finalizers"] == [names.FINALIZER]
    world.spec(deletionPolicy="Retain")
    world.settle()
    assert world.cluster.objects[OWNER]["metadata"]["finalizers"] == []
    world.cluster.remove(OWNER)
    world.settle()
    assert [each for each in world.cluster.objects if each[0] != "Event"] == []
    assert world.store.all_keys() == []


def _has_a_rank_of_an_older_template(world: World) -> Where:
    """A pod that the operator has to delete, and whose watch says nothing more."""
    world.spec(trainer={"nodes": 2})
    world.settle()
    workload, where = _where("StatefulSet", "qwen-trainer"), _where("Pod", "qwen-trainer-0")
    generation = world.cluster.objects[workload]["metadata"]["generation"]
    told = {"updateRevision": "new", "observedGeneration": generation}
    world.cluster.edit(workload, lambda body: body.update(status=told))
    world.cluster.set(_rank("old"))
    world.cluster.watchers.clear()
    return where


def _rank(revision: str) -> Manifest:
    labels = {**names.labels(KEY.name, names.TRAINER), "controller-revision-hash": revision}
    metadata = {"name": "qwen-trainer-0", "namespace": KEY.namespace, "labels": labels}
    return {"kind": "Pod", "metadata": metadata, "status": READY}


def test_a_pod_runs_until_the_watch_says_that_it_is_gone(world: World) -> None:
    where = _has_a_rank_of_an_older_template(world)

    run_now(world.reconciler.reconcile(KEY))

    assert where not in world.cluster.objects
    assert where[2] in {pod.name for pod in world.store.cached(KEY).pods}


def test_a_new_pod_of_the_name_of_a_deleted_one_is_left_alone(world: World) -> None:
    where = _has_a_rank_of_an_older_template(world)
    world.cluster.remove(where)
    world.cluster.set(_rank("new"))

    run_now(world.reconciler.reconcile(KEY))

    assert where in world.cluster.objects


def _urls(world: World) -> list[str]:
    secrets = (world.cluster.objects[_where("Secret", f"qwen-redis-{role}")]["data"]["url"] for role in Role)
    return [base64.b64decode(url).decode() for url in secrets]


def _template(world: World, part: str) -> Manifest:
    template: Manifest = world.cluster.objects[_where("Deployment", f"qwen-{part}")]["spec"]["template"]
    return template


def test_no_object_has_the_administrators_password(world: World) -> None:
    assert "secret@own" not in str(world.cluster.objects)
    assert all("secret@own" not in url and url.endswith("@own") for url in _urls(world))


def test_a_password_never_changes_while_it_is_there(world: World) -> None:
    before = _urls(world)
    for traces in ({"redis": {"urlSecretRef": {"name": "mine"}}}, {"redis": None}):
        world.spec(traces=traces)
        world.settle()
    assert _urls(world) == before
    assert len(set(before)) == 2


def test_a_secret_that_somebody_deletes_gets_a_new_password_and_restarts_its_pods(world: World) -> None:
    before, templates = _urls(world), [_template(world, part) for part in ("serving", "trainer")]
    world.cluster.remove(_where("Secret", "qwen-redis-writer"))
    world.clock.advance(61.0)
    world.settle()
    after = _urls(world)
    assert [old == new for old, new in zip(before, after, strict=True)] == [False, True]
    assert _template(world, "serving") != templates[0]
    assert _template(world, "trainer") == templates[1]


def test_a_changed_secret_is_read_again_at_the_next_resync(world: World) -> None:
    before = _urls(world)
    world.cluster.edit(_where("Secret", "qwen-redis-writer"), lambda body: body["data"].update(url=""))
    run_now(world.reconciler.reconcile(KEY))
    assert _urls(world) != before
    world.reconciler.look_again()
    run_now(world.reconciler.reconcile(KEY))
    assert _urls(world)[0].startswith("redis://")


def test_an_address_that_somebody_changes_is_set_right_with_its_password(world: World) -> None:
    before = _urls(world)
    changed = base64.b64encode(before[0].replace("@own", "@elsewhere").encode()).decode()
    world.cluster.edit(_where("Secret", "qwen-redis-writer"), lambda body: body["data"].update(url=changed))
    world.clock.advance(61.0)
    world.settle()
    assert _urls(world) == before


def _statuses(world: World, since: int) -> list[str]:
    """Names of objects that were written, each of which must be a status."""
    written = world.cluster.writes[since:]
    assert {kind for _, kind, _ in written} <= {"AdaptiveSpeculator", "DraftVersion"}
    return [name for _, _, name in written]


def test_another_number_of_the_registry_patches_a_status_at_its_pace_and_makes_no_plan(world: World) -> None:
    world.registry.traffic = {1: traffic(1, 2.0)}
    world.clock.advance(60.0)
    run_now(world.reconciler.refresh(KEY))
    before, num_plans = len(world.cluster.writes), world.num_plans

    for second in range(60):
        world.registry.traffic = {1: traffic(1, 2.0 + second / 50)}
        run_now(world.reconciler.refresh(KEY))
        world.clock.advance(1.0)

    assert _statuses(world, before).count("qwen") == 1, "once in 30 s, and the first was written before"
    assert world.num_plans == num_plans


def test_a_number_that_changes_a_condition_is_written_at_once_without_a_plan(world: World) -> None:
    world.registry.traffic = {1: traffic(1, 2.0)}
    world.settle()
    num_plans = world.num_plans

    world.registry.traffic = {1: traffic(1, 1.0)}
    run_now(world.reconciler.refresh(KEY))

    assert _condition(world, "SpeculationEffective") == ("False", "AcceptanceCollapsed")
    assert world.num_plans == num_plans


def test_a_refresh_is_due_again_when_the_status_may_be_written(world: World) -> None:
    world.registry.traffic = {1: traffic(1, 2.0)}
    run_now(world.reconciler.refresh(KEY))
    world.clock.advance(10.0)
    world.registry.traffic = {1: traffic(1, 2.5)}
    again = run_now(world.reconciler.refresh(KEY))
    assert again is not None
    assert (again.after_s, again.needs_plan) == (20.0, False)


def test_a_new_operator_makes_a_plan_before_it_refreshes(world: World) -> None:
    world.restart()
    run_now(world.reconciler.refresh(KEY))
    assert world.num_plans > 0


def test_a_refresh_reads_no_secret(world: World) -> None:
    before = world.cluster.num_reads
    world.registry.traffic = {1: traffic(1, 2.0)}
    world.clock.advance(3600.0)
    run_now(world.reconciler.refresh(KEY))
    assert world.cluster.num_reads == before


def test_the_status_of_another_object_of_the_same_name_is_left_alone(world: World) -> None:
    world.cluster.watchers.clear()  # nobody has told yet that this one is gone
    body = world.cluster.objects[OWNER]
    world.cluster.remove(OWNER)
    world.cluster.set({**body, "metadata": {"name": KEY.name, "namespace": KEY.namespace}, "status": {}})
    world.registry.publish()

    with pytest.raises(Unavailable):
        run_now(world.reconciler.refresh(KEY))

    assert world.cluster.objects[OWNER]["status"] == {}


def _told(world: World, where: Where) -> dict[str, tuple[str, str]]:
    conditions = world.cluster.objects[where]["status"]["conditions"]
    return {each["type"]: (each["status"], each["reason"]) for each in conditions}


def test_a_resource_that_cannot_be_observed_keeps_no_other_one_from_its_update(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(kind: str, _namespace: str, name: str) -> Manifest:
        raise Unavailable(f"{kind} {name} is not answered")

    world.restart()
    monkeypatch.setattr(world.cluster, "get", fails)
    with pytest.raises(Unavailable, match="is not answered"):
        run_now(world.reconciler.reconcile(KEY))
    assert _num_upgrades(world, "waiting") == 1


def test_a_resource_that_is_being_deleted_stops_no_updates() -> None:
    world = World()
    world.spec(deletionPolicy="Delete")
    world.settle()
    world.cluster.edit(OWNER, lambda body: body["metadata"].update(deletionTimestamp="2026-11-25T12:00:00Z"))
    world.turns.report(KEY, Upgrade(stage=Stage.FAILED, says=unknown("", ""), current=""))
    run_now(world.reconciler.reconcile(KEY))
    assert _num_upgrades(world, "failed") == 0


def test_an_update_of_which_one_workload_was_written_is_under_way_when_the_next_write_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World()
    world.settle()
    world.starts_registry()
    world.pod(names.SERVING, 1, READY)
    world.settle()
    world.config = replace(
        world.config, images=replace(CONFIG.images, inference="inference:2", trainer="trainer:2"), runtime="2"
    )
    world.restart()
    apply = world.cluster.apply
    applied: list[str] = []

    async def fails(content: Manifest, **more: Any) -> Manifest:
        if content["kind"] in ("Deployment", "StatefulSet") and content["metadata"]["annotations"].get(names.TURN):
            if applied:
                raise Unavailable("no answer")
            applied.append(content["metadata"]["name"])
        return await apply(content, **more)

    monkeypatch.setattr(world.cluster, "apply", fails)
    with pytest.raises(Unavailable):
        world.settle()
    assert len(applied) == 1
    assert _num_upgrades(world, "updating") == 1


def test_a_resource_that_is_deleted_while_its_ca_is_written_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(replace(CONFIG, tls=Tls(mode=TlsMode.SELF_SIGNED)))
    run_now(world.certificates.refresh())
    apply = world.cluster.apply

    async def is_deleted(content: Manifest, **more: Any) -> Manifest:
        answer = await apply(content, **more)
        if OWNER in world.cluster.objects:
            world.cluster.remove(OWNER)
        return answer

    monkeypatch.setattr(world.cluster, "apply", is_deleted)
    assert run_now(world.reconciler.reconcile(KEY)) is None


def _num_upgrades(world: World, stage: str) -> float:
    return float(world.metrics.upgrades.labels(stage)._value.get())


def test_a_resource_of_a_newer_version_says_that_it_cannot_be_read_and_keeps_the_rest(world: World) -> None:
    before = world.cluster.objects[OWNER]["status"]
    world.spec(engine={"type": "Quantum"})

    for _ in range(2):
        with pytest.raises(InvalidInput, match=r"cannot be read: spec\.engine"):
            run_now(world.reconciler.reconcile(KEY))

    told = _told(world, OWNER)
    assert (told["Ready"], told["Stalled"]) == (("False", "Unreadable"), ("True", "Unreadable"))
    after = world.cluster.objects[OWNER]["status"]
    assert after["versions"] == before["versions"]
    assert after["observedGeneration"] == world.cluster.objects[OWNER]["metadata"]["generation"]
    assert [kind for _, kind, _ in world.cluster.writes].count("AdaptiveSpeculator") == 3, "it is written once"

    world.spec(engine={"type": "Torch"})
    world.settle()
    assert "Stalled" not in _told(world, OWNER)


def test_a_draft_that_cannot_be_read_says_so_itself(world: World) -> None:
    where = _where("DraftVersion", "qwen-v1")
    world.cluster.edit(where, lambda body: body["spec"].update(source="Dreamt"))
    with pytest.raises(InvalidInput, match="DraftVersion qwen-v1 cannot be read"):
        run_now(world.reconciler.reconcile(KEY))
    assert _told(world, where)["Ready"] == ("False", "Unreadable")


def test_a_draft_of_a_person_without_a_speculator_says_so_and_one_of_the_operator_goes_with_its_own(
    world: World,
) -> None:
    owned, orphan = _where("DraftVersion", "qwen-v1"), _where("DraftVersion", "mine")
    before = world.cluster.objects[owned]["status"]
    del world.cluster.objects[OWNER]  # its own drafts are about to be deleted
    world.restart()
    spec = {"speculatorRef": {"name": KEY.name}, "source": "Trainer", "version": 9}
    metadata = {"name": "mine", "namespace": KEY.namespace}
    world.cluster.set({"kind": "DraftVersion", "metadata": metadata, "spec": spec, "status": {}})

    for _ in range(2):
        run_now(world.reconciler.reconcile(KEY))

    told = ("SpeculatorNotFound",)
    assert _told(world, orphan) == {"Ready": ("False", *told), "Stalled": ("True", *told)}
    assert world.cluster.writes.count(("apply", "DraftVersion", "mine")) == 1, "it is written once"
    assert world.cluster.objects[owned]["status"] == before


def test_an_import_without_a_speculator_says_so_until_there_is_one() -> None:
    world, mine = World(), _where("DraftImport", "mine")
    world.cluster.remove(OWNER)
    spec = {"speculatorRef": {"name": KEY.name}, "uri": "hf://org/draft"}
    metadata = {"name": "mine", "namespace": KEY.namespace}
    world.cluster.set({"kind": "DraftImport", "metadata": metadata, "spec": spec, "status": {}})

    for _ in range(2):
        run_now(world.reconciler.reconcile(KEY))

    assert _told(world, mine) == {"Ready": ("False", "SpeculatorNotFound")}
    assert world.cluster.writes == [("apply", "DraftImport", "mine")]
    owner = {"targetModel": {"uri": "/models/tiny"}}
    world.cluster.set({"kind": OWNER[0], "metadata": {"name": KEY.name, "namespace": KEY.namespace}, "spec": owner})
    world.settle()
    world.starts_registry()
    world.settle()
    assert _told(world, mine)["Ready"] == ("False", "Importing")
