import pytest

from updraft_tap.settings import Settings


def read(environment: dict[str, str]) -> Settings | None:
    return Settings.from_environment(environment, "UPDRAFT_SGLANG_")


def test_without_a_socket_nothing_is_wanted() -> None:
    assert read({"UPDRAFT_SGLANG_TOP_K": "8"}) is None
    assert read({"UPDRAFT_SGLANG_SOCKET": ""}) is None


def test_the_numbers_have_defaults() -> None:
    assert read({"UPDRAFT_SGLANG_SOCKET": "/s"}) == Settings(socket="/s", top_k=64, queue_bytes=64 << 20)


def test_the_numbers_are_read() -> None:
    environment = {
        "UPDRAFT_SGLANG_SOCKET": "/s",
        "UPDRAFT_SGLANG_TOP_K": "8",
        "UPDRAFT_SGLANG_QUEUE_BYTES": str(1 << 20),
    }
    assert read(environment) == Settings(socket="/s", top_k=8, queue_bytes=1 << 20)


@pytest.mark.parametrize(("name", "value"), [("TOP_K", "0"), ("TOP_K", "many"), ("TOP_K", "-3"), ("QUEUE_BYTES", "12")])
def test_an_absurd_number_is_refused_with_its_name(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"UPDRAFT_SGLANG_{name} is '{value}'"):
        read({"UPDRAFT_SGLANG_SOCKET": "/s", f"UPDRAFT_SGLANG_{name}": value})
