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


# An escape sequence, a line that looks like ours, C1 controls, a line separator, an order of writing, and a wide character.
HOSTILE = "x\x1b[2J\n12:00:00 INFO    registry: Promoted\r\x9b31m\u2028\u202e\U000e0001"


@pytest.mark.attack(
    boundary="text",
    attack="control characters and line breaks in what a peer says, in a log for people",
    outcome="escaped: it stays in its line, and a terminal shows it",
)
@pytest.mark.parametrize("where", ["message", "fact", "error"])
def test_foreign_text_begins_no_line_of_its_own_and_moves_no_cursor(
    capsys: pytest.CaptureFixture[str], where: str
) -> None:
    logs.configure(process="registry", format="text")
    error = ValueError(HOSTILE) if where == "error" else None
    logger.warning("Refused %s", HOSTILE if where == "message" else "it", extra={"why": HOSTILE}, exc_info=error)
    first, *traceback = lines(capsys)
    assert first.isprintable()
    assert r"why=x\u001b[2J\n12:00:00 INFO    registry: Promoted\r\u009b31m\u2028\u202e\udb40\udc01" in first
    assert all(line.startswith("  ") and line.isprintable() for line in traceback)
    assert bool(traceback) == (where == "error")


@pytest.mark.attack(
    boundary="text",
    attack="control characters and line breaks in what a peer says, in a log for machines",
    outcome="escaped: one JSON object per line, which says what was said",
)
def test_foreign_text_stays_in_its_object(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(process="registry")
    logger.warning("Refused %s", HOSTILE, extra={"why": HOSTILE})
    (line,) = lines(capsys)
    assert line.isprintable()
    record = json.loads(line)
    assert (record["message"], record["why"]) == (f"Refused {HOSTILE}", HOSTILE)


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
