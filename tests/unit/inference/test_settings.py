import pytest

from updraft_chassis import settings
from updraft_inference.settings import InferenceSettings


def load(**values: str) -> InferenceSettings:
    environ = {f"UPDRAFT_INFERENCE_{name.upper()}": value for name, value in values.items()}
    return settings.load(InferenceSettings, environ)


def test_a_model_is_all_that_is_needed() -> None:
    loaded = load(model="/models/Small-1B")

    assert loaded.model_name == "Small-1B"
    assert loaded.stream_keys == ["updraft:{default:default:0}:samples:v1"]
    assert loaded.pod_name
    assert not loaded.redis_url.get_secret_value()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param({}, "UPDRAFT_INFERENCE_MODEL: required", id="no model"),
        pytest.param({"model": "m", "port": "70000"}, "UPDRAFT_INFERENCE_PORT", id="port"),
        pytest.param({"model": "m", "speculator": "a:b"}, "UPDRAFT_INFERENCE_SPECULATOR", id="name"),
        pytest.param({"model": "m", "dtype": "float8"}, "UPDRAFT_INFERENCE_DTYPE", id="dtype"),
        pytest.param({"model": "m", "capture_payload_fraction": "2"}, "less than or equal to 1", id="fraction"),
        pytest.param({"model": "m", "slots": "8"}, "closest is UPDRAFT_INFERENCE_NUM_SLOTS", id="typo"),
        pytest.param(
            {"model": "m", "draft_path": "d", "registry_address": "r:1"}, "mutually exclusive", id="two sources"
        ),
    ],
)
def test_a_bad_environment_is_told_in_a_sentence(
    values: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        load(**values)

    assert caught.value.code == 2
    assert message in capsys.readouterr().err
