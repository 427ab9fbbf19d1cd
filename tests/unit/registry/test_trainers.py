from updraft_registry.trainers import Trainers


def test_a_trainers_sentence_is_kept_until_it_changes_or_the_trainer_is_silent() -> None:
    trainers = Trainers(expiry_s=45.0)
    assert trainers.message("default") == ""
    assert trainers.report("default", "waits", 0.0)
    assert not trainers.report("default", "waits", 40.0)
    assert not trainers.expire(85.0)
    assert trainers.message("default") == "waits"
    assert trainers.report("default", "publishes", 85.0)
    assert trainers.message("default") == "publishes"
    assert trainers.message("other") == ""
    assert trainers.speculators == ["default"]
    assert trainers.expire(130.1)
    assert trainers.message("default") == ""
    assert not trainers.expire(131.0)
