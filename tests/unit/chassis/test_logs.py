import asyncio
import json
import logging
import warnings
from collections.abc import Iterator

import pytest

from updraft_chassis import logs

logger = logging.getLogger("updraft.test")


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    before = (root.level, root.handlers[:])
    yield
    logging.captureWarnings(capture=False)
    root.setLevel(before[0])
    root.handlers[:] = before[1]


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


def test_a_record_is_one_json_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(process="trainer")
    logger.info("Published version %d\nof many", 7, extra={"digest": "sha256:ab", "size_bytes": 12})
    (line,) = lines(capsys)
    record = json.loads(line)
    assert record.pop("time").endswith("Z")
    assert record == {
        "level": "INFO",
        "process": "trainer",
        "logger": "updraft.test",
        "message": "Published version 7\nof many",
        "digest": "sha256:ab",
        "size_bytes": 12,
    }


def test_a_traceback_stays_in_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(process="trainer")
    try:
        int("odd")
    except ValueError:
        logger.exception("Failed")
    (line,) = lines(capsys)
    assert "ValueError: invalid literal" in json.loads(line)["exception"]


def test_an_extra_can_be_anything_but_never_a_standard_name(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(process="trainer")
    logger.info("Odd", extra={"what": {1, 2}, "level": "mine"})
    (line,) = lines(capsys)
    assert json.loads(line)["what"] == "{1, 2}"
    assert json.loads(line)["level"] == "INFO"


def test_a_person_reads_level_process_message_and_facts(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(process="registry", format="text")
    logger.warning("Rolled back", extra={"version": 3})
    (line,) = lines(capsys)
    assert line[8:] == " WARNING registry: Rolled back  version=3"


def test_records_below_the_level_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(process="registry", level="warning", format="text")
    logger.info("Chatter")
    assert lines(capsys) == []


def test_configuring_again_replaces_the_handler(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(process="one", format="text")
    logs.configure(process="two", format="text")
    logger.info("Once")
    assert len(lines(capsys)) == 1


def test_warnings_become_records(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        logs.configure(process="one", format="text")
        warnings.warn_explicit("old", DeprecationWarning, "file.py", 1)
    assert "DeprecationWarning: old" in "\n".join(lines(capsys))


def test_grpc_says_what_broke_a_call_but_not_that_a_peer_hung_up(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(process="registry")
    grpc_logger = logging.getLogger("grpc._cython.cygrpc")
    grpc_logger.error("Exception not handled", exc_info=asyncio.CancelledError())
    grpc_logger.error("Exception not handled", exc_info=ValueError("a bug"))
    logger.error("Cancelled", exc_info=asyncio.CancelledError())
    first, second = (json.loads(line) for line in lines(capsys))
    assert "a bug" in first["exception"]
    assert second["message"] == "Cancelled"
