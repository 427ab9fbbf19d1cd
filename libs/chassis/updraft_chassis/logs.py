"""Logs for a machine (one JSON object a line) or for a person, on stderr; facts travel in `extra={}`.

Standard logging, configured once per process: libraries and we speak the same dialect, and nothing wraps it.
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
    """Send every log record at `level` or above to stderr. Calling it again replaces what was configured."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(process) if format == "json" else TextFormatter(process))
    handler.addFilter(_is_news)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(capture=True)


def _is_news(record: logging.LogRecord) -> bool:
    """Not that grpc.aio saw its own task of a call cancelled: a peer that hangs up while its call is ended is no error."""
    error = record.exc_info[1] if record.exc_info else None
    return not (record.name.startswith("grpc.") and isinstance(error, asyncio.CancelledError))


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, process, logger, message, the extras, the traceback if any."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """Return the line. The five standard names win over extras of the same name."""
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
        return json.dumps({name: line[name] for name in order} | line, default=str, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """`12:30:05 INFO  trainer: message  key=value` for a person at a terminal."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, and the traceback below it if there is one."""
        extras = "".join(f"  {name}={value}" for name, value in _extras(record).items())
        head = f"{_time(record).astimezone():%H:%M:%S} {record.levelname:<7} {self._process}"
        text = f"{head}: {record.getMessage()}{extras}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def _time(record: logging.LogRecord) -> datetime:
    return datetime.fromtimestamp(record.created, UTC)


def _extras(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in record.__dict__.items() if name not in _STANDARD}
