"""TensorBoard's event files: records of TFRecord framing that hold an Event message.

The messages and the checksum are tensorboardX's. Its writers are not used: they have threads and queues of their own, between
which an error of the disk is late or lost.
"""

import struct
from collections.abc import Mapping

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c


def head(unix_s: float, *, first_step: int | None = None) -> bytes:
    """The beginning of a file. With `first_step`, a run continues there: TensorBoard drops later points of earlier files."""
    version = _record(Event(wall_time=unix_s, file_version="brain.Event:2"))
    if first_step is None:
        return version
    start = SessionLog(status=SessionLog.START)
    return version + _record(Event(wall_time=unix_s, step=first_step, session_log=start))


def row(unix_s: float, step: int, values: Mapping[str, float]) -> bytes:
    """Scalars of a step, by tag."""
    scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
    return _record(Event(wall_time=unix_s, step=step, summary=Summary(value=scalars)))


def _record(event: Event) -> bytes:
    data: bytes = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return length + _masked(length) + data + _masked(data)


def _masked(data: bytes) -> bytes:
    return struct.pack("<I", masked_crc32c(data))
