import pytest

from updraft.registry.v1.registry_pb2 import Learning
from updraft_chassis.errors import Exhausted
from updraft_registry import trainers as module
from updraft_registry.trainers import Trainers


@pytest.mark.attack(
    boundary="registry",
    attack="reports of ever more invented trainers",
    outcome="refused beyond a limit; known ones are heard",
)
def test_more_trainers_than_the_limit_are_refused_and_the_known_ones_are_still_heard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_TRAINERS", 2)
    trainers = Trainers()
    trainers.report("a", "waits", Learning(), 0.0)
    trainers.report("b", "waits", Learning(), 0.0)
    with pytest.raises(Exhausted, match="has reports of 2 trainers, which is the limit"):
        trainers.report("c", "waits", Learning(), 0.0)
    assert trainers.report("a", "publishes", Learning(), 1.0)


def test_a_trainer_demands_until_it_is_silent_and_then_nothing() -> None:
    trainers = Trainers(expiry_s=45.0)
    trainers.report("default", "waits", Learning(), 0.0, demand=500.0)
    trainers.report("other", "waits", Learning(), 0.0)
    assert trainers.demands == {"default": 500.0}, "the other takes whatever there is"
    trainers.expire(45.1)
    assert trainers.demands == {"default": 0.0}
    trainers.report("default", "waits", Learning(), 50.0, demand=70.0)
    assert trainers.demands == {"default": 70.0}
    trainers.report("default", "waits", Learning(), 51.0)
    assert trainers.demands == {}


def test_trainers_that_went_away_are_remembered_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TRAINERS", 2)
    trainers = Trainers(expiry_s=1.0)
    for at, name in enumerate("abc"):
        trainers.expire(2.0 * at)
        trainers.report(name, "waits", Learning(), 2.0 * at, demand=5.0)
    trainers.expire(99.0)
    assert trainers.demands == {"b": 0.0, "c": 0.0}


def test_a_trainers_sentence_is_kept_until_it_changes_or_the_trainer_is_silent() -> None:
    trainers = Trainers(expiry_s=45.0)
    assert trainers.message("default") == ""
    assert trainers.report("default", "waits", Learning(), 0.0)
    assert not trainers.report("default", "waits", Learning(), 40.0)
    assert not trainers.expire(85.0)
    assert trainers.message("default") == "waits"
    assert trainers.report("default", "publishes", Learning(), 85.0)
    assert trainers.message("default") == "publishes"
    assert trainers.message("other") == ""
    assert trainers.speculators == ["default"]
    assert trainers.expire(130.1)
    assert trainers.message("default") == ""
    assert not trainers.expire(131.0)


def test_what_a_trainer_has_done_is_news_and_is_forgotten_with_its_sentence() -> None:
    trainers = Trainers(expiry_s=45.0)
    assert trainers.learning("default") is None
    trainers.report("default", "waits", Learning(steps=1), 0.0)
    assert not trainers.report("default", "waits", Learning(steps=1), 1.0)
    assert trainers.report("default", "waits", Learning(steps=2), 2.0)
    assert trainers.learning("default") == Learning(steps=2)
    assert trainers.expire(50.0)
    assert trainers.learning("default") is None
