from pathlib import Path

import pytest

from updraft_tap.settings import DoorSettings, Settings


def read(environment: dict[str, str]) -> Settings | None:
    return Settings.from_environment(environment, "UPDRAFT_SGLANG_")


def test_without_a_socket_nothing_is_wanted() -> None:
    assert read({"UPDRAFT_SGLANG_TOP_K": "8"}) is None
    assert read({"UPDRAFT_SGLANG_SOCKET": ""}) is None


def test_the_settings_have_defaults() -> None:
    expected = Settings(socket="/s", top_k=64, queue_bytes=64 << 20, drafting="auto")
    assert read({"UPDRAFT_SGLANG_SOCKET": "/s"}) == expected


def test_the_settings_are_read() -> None:
    environment = {
        "UPDRAFT_SGLANG_SOCKET": "/s",
        "UPDRAFT_SGLANG_TOP_K": "8",
        "UPDRAFT_SGLANG_QUEUE_BYTES": str(1 << 20),
        "UPDRAFT_SGLANG_DRAFTING": "always",
    }
    assert read(environment) == Settings(socket="/s", top_k=8, queue_bytes=1 << 20, drafting="always")


@pytest.mark.parametrize(
    ("name", "value"),
    [("TOP_K", "0"), ("TOP_K", "many"), ("TOP_K", "-3"), ("QUEUE_BYTES", "12"), ("DRAFTING", "never")],
)
def test_an_absurd_value_is_refused_with_its_name(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"UPDRAFT_SGLANG_{name} is '{value}'"):
        read({"UPDRAFT_SGLANG_SOCKET": "/s", f"UPDRAFT_SGLANG_{name}": value})


def door(**environment: str) -> DoorSettings:
    return DoorSettings.from_environment(
        {f"UPDRAFT_VLLM_{name}": value for name, value in environment.items()}, "UPDRAFT_VLLM_"
    )


def test_without_a_file_of_keys_everybody_is_let_in() -> None:
    assert door() == DoorSettings(api_keys_file=None, max_requests_per_key=0)


def test_what_the_door_asks_for_is_read() -> None:
    assert door(API_KEYS_FILE="/keys", MAX_REQUESTS_PER_KEY="3") == DoorSettings(
        api_keys_file=Path("/keys"), max_requests_per_key=3
    )


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"MAX_REQUESTS_PER_KEY": "3"}, "MAX_REQUESTS_PER_KEY requires UPDRAFT_VLLM_API_KEYS_FILE"),
        ({"MAX_REQUESTS_PER_KEY": "many"}, "MAX_REQUESTS_PER_KEY is 'many', but must be a whole number"),
    ],
)
def test_a_door_that_cannot_be_meant_is_refused(environment: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        door(**environment)
