"""How much replay may store, and what is too small for any draft to be published. Pure: sizes of the disk are arguments."""

from collections.abc import Sequence
from dataclasses import dataclass

from updraft_artifacts.sizing import (
    NUM_DRAFTS,
    NUM_STATES,
    REPLAY_FILES,
    Sizing,
    kept_requests,
    quantity,
    readable,
    replay_for,
    reserved,
)

SETTING = "UPDRAFT_TRAINER_REPLAY_MAX_BYTES"
VOLUME = "the disk of UPDRAFT_TRAINER_DATA_DIR"

_MEGABYTES = 10 * 10**6
"""Step of the sizes to set, so that a sentence does not change with every trace."""

_LEAST = 1024**2

_SLACK = 1.1 * REPLAY_FILES
"""File systems keep a part of a volume, and replay writes before it deletes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """Bytes of replay; of the volume for whatever the trainer stores; and of that, those for states and drafts."""

    replay_bytes: int
    volume_bytes: int
    reserved_bytes: int
    is_set: bool
    """A person set the size of replay."""

    @classmethod
    def of(cls, setting: int | None, sizes: Sizing, *, volume_bytes: int) -> "Capacity":
        """Take the setting, or by default as much as learning needs for this target and the volume has room for."""
        reserved_bytes = reserved(sizes.state, sizes.version)
        room = int((volume_bytes - reserved_bytes) / _SLACK)
        return cls(
            replay_bytes=max(_LEAST, min(sizes.replay.amount, room)) if setting is None else setting,
            volume_bytes=volume_bytes,
            reserved_bytes=reserved_bytes,
            is_set=setting is not None,
        )

    def too_small(self, pools: Sequence[tuple[int, int]], *, min_samples: int) -> str:
        """One sentence that names what to enlarge; empty if drafts can be judged.

        `pools` has requests and bytes of each pool of replay, from which the mean length of requests is known.
        """
        num_samples, num_bytes = (sum(counts) for counts in zip(*pools, strict=True))
        mean = max(1, num_bytes // max(1, num_samples))
        needed = replay_for(min_samples, mean)
        if self._volume_for(self.replay_bytes) > self.volume_bytes:
            return (
                f"{VOLUME} has {readable(self.volume_bytes)} for {NUM_STATES} training states and {NUM_DRAFTS} drafts of"
                f" {readable(self.reserved_bytes)}, and for replay of {readable(self.replay_bytes)}: it needs at least"
                f" {quantity(self._volume_for(max(needed, self.replay_bytes)))}; then restart the trainer"
            )
        _, num_held_out = kept_requests(self.replay_bytes, mean)
        if num_held_out >= min_samples:
            return ""
        room = (
            f"replay has room for {num_held_out} held-out requests of {readable(mean)}, the mean, but {min_samples} are needed"
            " to judge a draft"
        )
        if self.is_set or self._volume_for(needed) <= self.volume_bytes:
            return f"{room}: raise {SETTING} to at least {-(-needed // _MEGABYTES) * _MEGABYTES}"
        return f"{room}: {VOLUME} needs at least {quantity(self._volume_for(needed))}; then restart the trainer"

    def _volume_for(self, replay_bytes: int) -> int:
        return int(_SLACK * replay_bytes) + self.reserved_bytes
