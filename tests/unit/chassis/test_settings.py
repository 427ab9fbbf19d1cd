from pathlib import Path
from typing import Literal, Self

import pytest
from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_settings import SettingsConfigDict

from updraft_chassis.settings import Settings, load, variable


class RouterSettings(Settings):
    model_config = SettingsConfigDict(env_prefix="UPDRAFT_ROUTER_")

    target: str
    """The model that is served."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Where to listen."""
    data_dir: Path = Path("/var/lib/updraft")
    log_format: Literal["json", "text"] = "json"
    redis_url: SecretStr | None = None
    min_slots: int = 1
    max_slots: int = 8

    @model_validator(mode="after")
    def _slots_make_sense(self) -> Self:
        if self.min_slots > self.max_slots:
            raise ValueError("MIN_SLOTS exceeds MAX_SLOTS")
        return self


def problems(environ: dict[str, str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    with pytest.raises(SystemExit) as end:
        load(RouterSettings, environ)
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


def test_values_come_from_variables_with_the_parts_prefix() -> None:
    settings = load(
        RouterSettings,
        {
            "UPDRAFT_ROUTER_TARGET": "smol",
            "UPDRAFT_ROUTER_PORT": "9",
            "UPDRAFT_TRAINER_PORT": "1",
            "PATH": "/bin",
        },
    )
    assert (settings.target, settings.port, settings.log_format) == ("smol", 9, "json")


def test_without_an_argument_the_processes_own_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPDRAFT_ROUTER_TARGET", "smol")
    assert load(RouterSettings).target == "smol"


def test_settings_built_in_code_read_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPDRAFT_ROUTER_PORT", "9")
    assert RouterSettings(target="smol").port == 8000


def test_settings_cannot_be_changed() -> None:
    settings = RouterSettings(target="smol")
    with pytest.raises(ValidationError, match="frozen"):
        settings.port = 1  # type: ignore[misc] # what mypy forbids, pydantic forbids too


def test_all_problems_are_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    printed = problems(
        {
            "UPDRAFT_ROUTER_PORT": "high",
            "UPDRAFT_ROUTER_LOG_FORMAT": "xml",
            "UPDRAFT_ROUTER_DATADIR": "/tmp",
        },
        capsys,
    )
    assert printed == [
        "UPDRAFT_ROUTER_TARGET: required, but not set",
        "UPDRAFT_ROUTER_PORT: Input should be a valid integer, unable to parse string as an integer; got 'high'",
        "UPDRAFT_ROUTER_LOG_FORMAT: Input should be 'json' or 'text'; got 'xml'",
        "UPDRAFT_ROUTER_DATADIR: no such setting; the closest is UPDRAFT_ROUTER_DATA_DIR",
    ]


def test_an_unknown_variable_alone_is_a_problem(capsys: pytest.CaptureFixture[str]) -> None:
    printed = problems({"UPDRAFT_ROUTER_TARGET": "smol", "UPDRAFT_ROUTER_PROT": "1"}, capsys)
    assert printed == ["UPDRAFT_ROUTER_PROT: no such setting; the closest is UPDRAFT_ROUTER_PORT"]


@pytest.mark.attack(boundary="text", attack="reading a secret from printed settings", outcome="it is masked")
def test_a_secret_is_never_printed(capsys: pytest.CaptureFixture[str]) -> None:
    environ = {
        "UPDRAFT_ROUTER_TARGET": "smol",
        "UPDRAFT_ROUTER_REDIS_URL": "redis://:hunter2@cache",
        "UPDRAFT_ROUTER_X": "",
    }
    assert "hunter2" not in "\n".join(problems(environ, capsys))
    assert "hunter2" not in repr(load(RouterSettings, {k: v for k, v in environ.items() if not k.endswith("_X")}))


class SecretSettings(Settings):
    model_config = SettingsConfigDict(env_prefix="UPDRAFT_VAULT_")

    token: SecretStr = Field(min_length=20)


@pytest.mark.attack(boundary="text", attack="reading a secret from an error about it", outcome="it is not in it")
def test_a_secret_that_is_wrong_is_not_printed_either(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load(SecretSettings, {"UPDRAFT_VAULT_TOKEN": "hunter2"})
    printed = capsys.readouterr().err
    assert printed.startswith("UPDRAFT_VAULT_TOKEN: ")
    assert "the value is secret" in printed
    assert "hunter2" not in printed


def test_a_problem_of_several_fields_does_not_print_the_environment(
    capsys: pytest.CaptureFixture[str],
) -> None:
    environ = {
        "UPDRAFT_ROUTER_TARGET": "smol",
        "UPDRAFT_ROUTER_MIN_SLOTS": "9",
        "UPDRAFT_ROUTER_REDIS_URL": "hunter2",
    }
    assert problems(environ, capsys) == ["UPDRAFT_ROUTER: Value error, MIN_SLOTS exceeds MAX_SLOTS"]


def test_a_kubernetes_service_link_is_recognised(capsys: pytest.CaptureFixture[str]) -> None:
    (told,) = problems({"UPDRAFT_ROUTER_TARGET": "smol", "UPDRAFT_ROUTER_PORT": "tcp://10.0.0.7:8000"}, capsys)
    assert "enableServiceLinks: false" in told


def test_a_field_knows_its_variable_and_its_description() -> None:
    assert variable(RouterSettings, "data_dir") == "UPDRAFT_ROUTER_DATA_DIR"
    assert RouterSettings.model_fields["port"].description == "Where to listen."
