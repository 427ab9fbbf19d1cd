"""The trainer's progress as the registry shows it: evidence that drafts follow the traffic."""

from updraft.registry.v1 import registry_pb2
from updraft_trainer.data.capacity import Capacity, redis_too_small
from updraft_trainer.data.replay import Replay
from updraft_trainer.data.retention import Pool


class LearningRecord:
    """The loop counts, and another thread reads."""

    def __init__(
        self,
        replay: Replay,
        capacity: Capacity,
        *,
        min_samples: int,
        version_bytes: int,
        stream_bytes: int,
        samples_to_start: int,
    ) -> None:
        self._replay = replay
        self._capacity = capacity
        self._min_samples = min_samples
        self._version_bytes = version_bytes
        self._stream_bytes = stream_bytes
        self.max_memory = 0
        """Bytes that Redis may use; 0 without a limit, or before it was asked."""
        self.elsewhere = (0, 0)
        """Requests that other ranks store: to train on, and held out."""
        self.samples_to_start = samples_to_start
        """Stored requests that a new draft waits for; 0 once a draft is trained."""
        self.last_step_s = 0.0
        """Unix time of this process's last optimizer step."""
        self.steps = 0
        """Optimizer steps of the draft in training."""
        self.estimates = 0
        """Candidates that held-out requests judged."""

    def trained(self, step: int, now_s: float | None) -> None:
        """A draft is in training at this step; `now_s` if it was just taken."""
        self.steps, self.samples_to_start = step, 0
        if now_s is not None:
            self.last_step_s = now_s

    def read(self) -> registry_pb2.Learning:
        requests = {pool: self._replay.num_requests(pool) for pool in Pool}
        pools = [(requests[pool], self._replay.num_bytes(pool)) for pool in Pool]
        held_out = requests[Pool.EVALUATION]
        return registry_pb2.Learning(
            samples=sum(requests.values()) - held_out + self.elsewhere[0],
            held_out=held_out + self.elsewhere[1],
            steps=self.steps,
            estimates=self.estimates,
            too_small=self._capacity.too_small(pools, min_samples=self._min_samples)
            or redis_too_small(self.max_memory, self._stream_bytes),
            version_bytes=self._version_bytes,
            samples_to_start=self.samples_to_start,
            last_step_unix_ms=int(1000 * self.last_step_s),
        )
