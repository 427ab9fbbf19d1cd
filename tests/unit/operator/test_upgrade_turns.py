"""One resource at a time, over all of them, and none while one does not come back."""

from dataclasses import dataclass, field

import pytest
from prometheus_client import CollectorRegistry

from updraft_operator.metrics import Metrics
from updraft_operator.planning.assessment import unknown
from updraft_operator.planning.objects import Key, Ref
from updraft_operator.planning.runtime.records import Held
from updraft_operator.planning.runtime.upgrade import Stage, Upgrade
from updraft_operator.upgrade_turns import UpgradeTurns

A, B, C = (Key("team", name) for name in "abc")


@dataclass
class _Fleet:
    most: int = 1
    keys: list[Key] = field(default_factory=lambda: [A, B, C])
    begun: list[Key] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.collectors = CollectorRegistry()
        self.turns = UpgradeTurns(self.most, lambda: self.keys, self.begun.append, Metrics(self.collectors))

    def report(self, stage: Stage, *keys: Key) -> None:
        for key in keys or self.keys:
            self.turns.report(key, Upgrade(stage=stage, says=unknown("", ""), current=""))


def test_nothing_begins_before_every_resource_has_been_looked_at() -> None:
    fleet = _Fleet()
    fleet.report(Stage.READY, A, B)
    assert fleet.begun == []
    fleet.report(Stage.UPDATING, C)
    assert fleet.begun == []
    fleet.report(Stage.CURRENT, C)
    assert fleet.begun == [A]


def test_the_next_one_begins_when_the_last_one_has_come_back() -> None:
    fleet = _Fleet()
    fleet.report(Stage.READY)
    fleet.report(Stage.READY)
    assert fleet.begun == [A]
    fleet.report(Stage.UPDATING, A)
    assert [fleet.turns.has_turn(key) for key in fleet.keys] == [True, False, False]
    fleet.report(Stage.CURRENT, A)
    assert fleet.begun == [A, B]


def test_one_that_does_not_come_back_stops_the_others_until_it_does_or_is_skipped() -> None:
    fleet = _Fleet(most=2)
    fleet.report(Stage.READY)
    fleet.report(Stage.UPDATING, A)
    fleet.report(Stage.FAILED, A)
    fleet.report(Stage.CURRENT, B)
    assert fleet.turns.stops(C) == "a"
    assert not fleet.turns.has_turn(C)
    assert fleet.collectors.get_sample_value("updraft_operator_upgrades", {"stage": "failed"}) == 1
    fleet.report(Stage.WAITING, A)
    assert fleet.turns.stops(C) == ""
    assert fleet.turns.has_turn(C)


def test_a_turn_that_cannot_be_used_goes_to_the_next_one() -> None:
    fleet = _Fleet()
    fleet.report(Stage.READY)
    fleet.report(Stage.WAITING, A)
    assert fleet.begun == [A, B]


def test_a_resource_that_is_deleted_frees_its_turn() -> None:
    fleet = _Fleet()
    fleet.report(Stage.READY)
    fleet.keys.remove(A)
    fleet.turns.forget(A)
    assert fleet.begun == [A, B]


def test_one_that_another_process_began_is_continued_at_once() -> None:
    fleet = _Fleet()
    held = (Held(ref=Ref("Deployment", "a-serving"), runtime="1", change="template"),)
    begun = Upgrade(stage=Stage.UPDATING, says=unknown("", ""), current="1", held=held)
    for _ in range(2):
        fleet.turns.report(B, begun)
    assert fleet.begun == [B]


def test_with_none_allowed_nothing_begins() -> None:
    fleet = _Fleet(most=0)
    fleet.report(Stage.READY)
    assert fleet.begun == []


def test_another_leader_asks_everybody_again() -> None:
    fleet = _Fleet()
    fleet.report(Stage.READY)
    fleet.turns.start_over()
    assert fleet.collectors.get_sample_value("updraft_operator_upgrades", {"stage": "ready"}) == 0
    assert not fleet.turns.has_turn(A)
    fleet.report(Stage.READY, B)
    assert fleet.begun == [A]


def test_a_turn_that_has_not_begun_ends_when_another_one_fails() -> None:
    fleet = _Fleet(most=2)
    fleet.report(Stage.READY)
    fleet.report(Stage.FAILED, A)
    assert not fleet.turns.has_turn(B)


def test_an_error_gives_the_turn_to_the_next_one() -> None:
    fleet = _Fleet()
    fleet.report(Stage.READY)
    fleet.turns.cannot_say(A)
    assert fleet.begun == [A, B]
    assert not fleet.turns.has_turn(A)


def test_an_error_after_the_first_workload_got_the_turn_leaves_the_turn_where_it_is() -> None:
    fleet = _Fleet()
    fleet.report(Stage.READY)
    fleet.turns.began(A)
    fleet.turns.cannot_say(A)
    assert fleet.begun == [A]
    assert fleet.turns.has_turn(A)


def test_a_workload_that_is_written_without_a_turn_begins_no_update() -> None:
    fleet = _Fleet()
    fleet.report(Stage.READY)
    fleet.turns.began(B)
    assert [fleet.turns.has_turn(key) for key in fleet.keys] == [True, False, False]


def test_one_that_cannot_be_looked_at_lets_the_others_go_on() -> None:
    fleet = _Fleet()
    fleet.report(Stage.READY, A, B)
    fleet.turns.cannot_say(C)
    assert fleet.begun == [A]


@pytest.mark.parametrize("stage", [Stage.UPDATING, Stage.FAILED])
def test_one_that_cannot_be_looked_at_any_more_is_where_it_was(stage: Stage) -> None:
    fleet = _Fleet()
    fleet.report(stage, A)
    fleet.report(Stage.READY, B, C)
    fleet.turns.cannot_say(A)
    assert fleet.turns.has_turn(A)
    assert not fleet.turns.has_turn(B)
    fleet.turns.leave(A)
    assert fleet.turns.has_turn(B)


def test_the_others_are_told_when_one_fails_and_when_it_is_back() -> None:
    fleet = _Fleet(most=0)
    fleet.report(Stage.READY)
    for stage in (Stage.FAILED, Stage.FAILED, Stage.CURRENT):
        fleet.report(stage, A)
    assert fleet.begun == [B, C, B, C]


def test_a_tenant_does_not_learn_the_names_of_others() -> None:
    fleet = _Fleet()
    fleet.report(Stage.FAILED, A)
    assert fleet.turns.stops(Key("team", "x")) == "a"
    assert fleet.turns.stops(Key("another", "x")) == "a resource of another namespace"
