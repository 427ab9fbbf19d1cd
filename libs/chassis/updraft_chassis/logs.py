"""Logs on stderr: one JSON object per line, or text for a person. Fields go into `extra={}`.

This is the standard `logging` module, configured once per process, so libraries log the same way. Records contain foreign
text, such as names and errors of peers. It can neither begin a line of its own nor move a terminal's cursor.
"""

import asyncio
import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


def configure(
    *,
    process: str,
    level: str = "INFO",
    format: Literal["json", "text"] = "json",  # noqa: A002 - named like the setting
) -> None:
    """Send every log record at `level` or above to stderr. A second call replaces the first."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(process) if format == "json" else TextFormatter(process))
    handler.addFilter(_is_relevant)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(capture=True)


def _is_relevant(record: logging.LogRecord) -> bool:
    """False for the cancelled tasks that grpc.aio logs: a peer that disconnects while its call ends is no error."""
    error = record.exc_info[1] if record.exc_info else None
    return not (record.name.startswith("grpc.") and isinstance(error, asyncio.CancelledError))


class _Formatter(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process


class JsonFormatter(_Formatter):
    """One JSON object per line: time, level, process, logger, message, extras, traceback. Extras cannot override these."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = _extras(record) | {
            "time": _time(record).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        order = ("time", "level", "process", "logger", "message")
        return printable(json.dumps({name: line[name] for name in order} | line, default=str, ensure_ascii=False))


class TextFormatter(_Formatter):
    """`12:30:05 INFO  trainer: message  key=value`, and the traceback below it."""

    def format(self, record: logging.LogRecord) -> str:
        extras = "".join(f"  {name}={value}" for name, value in _extras(record).items())
        head = f"{_time(record).astimezone():%H:%M:%S} {record.levelname:<7} {self._process}"
        text = printable(f"{head}: {record.getMessage()}{extras}")
        if not record.exc_info:
            return text
        return "\n".join(
            [text, *(f"  {printable(line)}" for line in self.formatException(record.exc_info).split("\n"))]
        )


def printable(text: str) -> str:
    """The text with control characters, line breaks and invisible ones escaped as in JSON."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)


def _time(record: logging.LogRecord) -> datetime:
    return datetime.fromtimestamp(record.created, UTC)


def _extras(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in record.__dict__.items() if name not in _STANDARD}
