import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from updraft_chassis.errors import Conflict, InvalidInput, UpdraftError
from updraft_chassis.lifecycle import Stop
from updraft_trainer.data.replay import INDEX
from updraft_trainer.process import serve
from updraft_trainer.settings import TrainerSettings


def config(tmp_path: Path, target: Path, **changed: Path | int) -> TrainerSettings:
    values: dict[str, object] = {
        "model": target,
        "data_dir": tmp_path / "data",
        "redis_url": "redis://127.0.0.1:1",
        "registry_address": "127.0.0.1:1",
        "metrics_port": 0,
    }
    return TrainerSettings.model_validate(values | changed)


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield int(taken.getsockname()[1])


async def refusal(config: TrainerSettings, kind: type[UpdraftError]) -> str:
    with pytest.raises(kind) as caught:
        await serve(config, Stop())
    return str(caught.value)


async def test_an_absent_model_is_named(tmp_path: Path, tiny_target: Path) -> None:
    message = await refusal(config(tmp_path, tiny_target, model=Path("/nowhere")), InvalidInput)
    assert message == "/nowhere/config.json does not exist"


async def test_a_folder_that_cannot_be_written_is_named_with_its_setting(tmp_path: Path, tiny_target: Path) -> None:
    message = await refusal(config(tmp_path, tiny_target, data_dir=Path("/proc/trainer")), Conflict)
    assert message.startswith("cannot write to /proc/trainer")
    assert "set UPDRAFT_TRAINER_DATA_DIR" in message


async def test_a_port_that_is_taken_is_named_with_its_setting(
    tmp_path: Path, tiny_target: Path, taken_port: int
) -> None:
    message = await refusal(config(tmp_path, tiny_target, metrics_port=taken_port), Conflict)
    assert f"127.0.0.1:{taken_port}" in message
    assert "UPDRAFT_TRAINER_METRICS_PORT" in message


async def test_a_damaged_replay_is_named_and_not_replaced(tmp_path: Path, tiny_target: Path) -> None:
    index = tmp_path / "data" / "replay" / INDEX
    index.parent.mkdir(parents=True)
    index.write_bytes(b"damaged " * 1000)
    message = await refusal(config(tmp_path, tiny_target), UpdraftError)
    assert f"{index} is damaged" in message
    assert index.read_bytes() == b"damaged " * 1000
