"""The admin key of an SGLang server that Updraft starts, and its arguments."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from updraft_chassis.errors import InvalidInput
from updraft_inference.launch import admin_key, sglang_arguments
from updraft_inference.settings import InferenceSettings
from updraft_inference.sidecar import started


def settings(data: Path, **chosen: Any) -> InferenceSettings:
    return InferenceSettings(model=Path("/models/tiny"), engine="sglang", data_dir=data, port=8123, **chosen)


def arguments(beside: InferenceSettings) -> list[str]:
    return sglang_arguments.serving(started.sglang_options(beside), Path("/draft"))


def config(words: list[str]) -> Path:
    return Path(words[words.index("--config") + 1])


def key_of(beside: InferenceSettings) -> str:
    """The key that the agent sends."""
    return admin_key.of(beside.sglang_admin_key.get_secret_value(), beside.sglang_admin_key_file)


def test_server_and_agent_share_a_random_key_that_is_in_a_file_and_no_argument(tmp_path: Path) -> None:
    words, beside = arguments(settings(tmp_path)), started.attached(settings(tmp_path))

    assert config(words).is_relative_to(tmp_path)
    assert admin_key.read(config(words)) == key_of(beside)
    assert not any(key_of(beside) in word for word in words)
    assert beside.attach == "http://127.0.0.1:8123"


def test_the_key_stays_the_same_after_a_restart(tmp_path: Path) -> None:
    assert key_of(started.attached(settings(tmp_path))) == key_of(started.attached(settings(tmp_path)))


def test_a_key_that_was_chosen_is_no_argument_either(tmp_path: Path) -> None:
    chosen = settings(tmp_path, sglang_admin_key=SecretStr("chosen-by-me"))
    beside = started.attached(chosen)

    assert admin_key.read(config(arguments(chosen))) == key_of(beside) == "chosen-by-me"
    assert not any("chosen-by-me" in word for word in arguments(chosen))


def test_a_file_that_was_chosen_is_used_as_it_is(tmp_path: Path) -> None:
    admin_key.write(file := tmp_path / "mine.yaml")
    before = file.read_text()
    chosen = settings(tmp_path / "data", sglang_admin_key_file=file)

    assert key_of(started.attached(chosen)) == admin_key.read(config(arguments(chosen)))
    assert config(arguments(chosen)) == file
    assert file.read_text() == before


def test_a_file_that_sglang_or_the_agent_cannot_read_is_refused(tmp_path: Path) -> None:
    (damaged := tmp_path / "damaged.yaml").write_text("{}")

    with pytest.raises(InvalidInput, match=r"damaged\.yaml has no admin-api-key"):
        started.attached(settings(tmp_path, sglang_admin_key_file=damaged))
    with pytest.raises(InvalidInput, match=r"key\.json must end in \.yaml"):
        started.attached(settings(tmp_path, sglang_admin_key_file=tmp_path / "key.json"))


@pytest.mark.parametrize(
    ("args", "message"),
    [("--config=mine.yaml", "write --config FILE"), ("--api-key secret", "UPDRAFT_SGLANG_API_KEYS_FILE")],
)
def test_arguments_that_would_leave_the_agent_without_a_key_are_refused(
    tmp_path: Path, args: str, message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        arguments(settings(tmp_path, sglang_args=args))


@pytest.mark.parametrize("key", ["-starts-like-an-argument", "schl\u00fcssel-0123456789", "two words"])
def test_an_admin_key_that_cannot_be_sent_is_refused_without_being_shown(tmp_path: Path, key: str) -> None:
    with pytest.raises(InvalidInput, match="admin-api-key") as refused:
        started.attached(settings(tmp_path, sglang_admin_key=SecretStr(key)))

    assert key not in str(refused.value)


def test_a_chosen_admin_key_ends_with_its_setting(tmp_path: Path) -> None:
    random = key_of(started.attached(settings(tmp_path)))
    chosen = key_of(started.attached(settings(tmp_path, sglang_admin_key=SecretStr("chosen-0123456789"))))

    assert chosen == "chosen-0123456789"
    assert key_of(started.attached(settings(tmp_path))) == random
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and chosen in file.read_text()]


def test_a_chosen_key_leaves_no_file_once_the_server_has_a_key_of_its_own(tmp_path: Path) -> None:
    started.attached(settings(tmp_path, sglang_admin_key=SecretStr("chosen-0123456789")))
    own = settings(tmp_path, sglang_admin_key=SecretStr("another"), sglang_args="--admin-api-key another")

    assert key_of(started.attached(own)) == "another"
    assert not list(tmp_path.rglob("*.yaml"))


def test_an_unused_key_that_cannot_be_removed_is_named(tmp_path: Path) -> None:
    (folder := tmp_path / "sglang" / "chosen-admin-key.yaml").mkdir(parents=True)

    with pytest.raises(InvalidInput, match=f"cannot remove the unused admin key {folder}"):
        started.attached(settings(tmp_path))


@pytest.mark.parametrize("own", ["--config mine.yaml", "--admin-api-key secret", "--admin-api-key=secret"])
def test_a_server_with_a_key_or_a_configuration_of_its_own_gets_none_of_ours(tmp_path: Path, own: str) -> None:
    chosen = settings(tmp_path, sglang_args=own, sglang_admin_key=SecretStr("secret"))
    words = arguments(chosen)

    assert words[-len(own.split()) :] == own.split()
    assert words.count("--config") == own.count("--config")
    assert key_of(started.attached(chosen)) == "secret"
    assert not list(tmp_path.iterdir())
