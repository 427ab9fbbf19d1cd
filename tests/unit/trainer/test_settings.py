import pytest

from updraft_chassis.settings import load
from updraft_trainer.settings import TrainerSettings

NEEDED = {
    "UPDRAFT_TRAINER_MODEL": "/models/m",
    "UPDRAFT_TRAINER_DATA_DIR": "/data",
    "UPDRAFT_TRAINER_REDIS_URL": "redis://localhost",
    "UPDRAFT_TRAINER_REGISTRY_ADDRESS": "localhost:50051",
}


def test_what_has_no_default_is_enough() -> None:
    settings = load(TrainerSettings, NEEDED)
    assert settings.stream_keys == ["updraft:{default:default:0}:samples:v1"]
    assert settings.pod_name


def test_the_parts_get_what_was_set() -> None:
    settings = load(
        TrainerSettings,
        NEEDED
        | {
            "UPDRAFT_TRAINER_LEARNING_RATE": "0.01",
            "UPDRAFT_TRAINER_LOSS": "acceptance",
            "UPDRAFT_TRAINER_DISCARD_WEIGHT": "0.1",
            "UPDRAFT_TRAINER_MIN_SAMPLES": "20",
            "UPDRAFT_TRAINER_EVALUATE_SECONDS": "3",
            "UPDRAFT_TRAINER_NAMESPACE": "team-a",
        },
    )
    assert settings.hyper.learning_rate == 0.01
    assert settings.hyper.loss == "acceptance"
    assert settings.hyper.discard_weight == 0.1
    assert settings.thresholds.min_samples == 20
    assert settings.schedule.evaluate_seconds == 3.0
    assert settings.stream_keys[0].startswith("updraft:{team-a:")


def test_everything_that_is_missing_or_wrong_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {"UPDRAFT_TRAINER_TTT_STEPS": "many", "UPDRAFT_TRAINER_BATCH_TOKEN": "4"}
    with pytest.raises(SystemExit) as exit_:
        load(TrainerSettings, wrong)
    assert exit_.value.code == 2
    errors = capsys.readouterr().err
    for name in (*NEEDED, *wrong, "UPDRAFT_TRAINER_BATCH_TOKENS"):
        assert name in errors


@pytest.mark.attack(
    boundary="text",
    attack="reading the Redis password from a trainer's settings",
    outcome="it is masked",
)
def test_the_password_of_redis_is_never_printed(capsys: pytest.CaptureFixture[str]) -> None:
    secret = NEEDED | {"UPDRAFT_TRAINER_REDIS_URL": "redis://:hunter2@cache"}
    assert "hunter2" not in repr(load(TrainerSettings, secret))
    with pytest.raises(SystemExit):
        load(TrainerSettings, secret | {"UPDRAFT_TRAINER_TTT_STEPS": "many"})
    with pytest.raises(SystemExit):
        load(TrainerSettings, secret | {"UPDRAFT_TRAINER_REDIS_URL": ""})
    assert "hunter2" not in capsys.readouterr().err


def test_every_field_explains_itself() -> None:
    assert [name for name, field in TrainerSettings.model_fields.items() if not field.description] == []
