"""A switchback as a function of time: which of two versions serves now, and for how long. Pure.

Slices are counted on the wall clock from the start of the plan, so a restarted pod follows the same schedule. A clock
that jumps only shifts the slices.
"""

from dataclasses import dataclass

from updraft.fleet.v1 import fleet_pb2

MIN_SLICE_S = 2
"""A swap pauses the decode loop for milliseconds, but reading and hashing the draft takes up to seconds of a core."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """`version` serves for another `left_s` seconds, more than 0."""

    version: int
    left_s: float


def current(plan: fleet_pb2.Switchback, now_s: float) -> Slice:
    """The slice at `now_s`, in Unix seconds: A in even slices, B in odd ones, also before the start of the plan."""
    length_ms = 1000 * max(MIN_SLICE_S, plan.slice_seconds)
    index, past_ms = divmod(int(1000 * now_s) - plan.start_unix_ms, length_ms)
    return Slice(version=plan.version_b if index % 2 else plan.version_a, left_s=(length_ms - past_ms) / 1000)
