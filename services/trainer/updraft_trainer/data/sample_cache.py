"""Samples in memory, because each sample is used several times. Evicts the least recently used."""

import threading
from collections import OrderedDict

from updraft_trainer.data.sample import Sample

DEFAULT_MAX_BYTES = 512 * 1024**2
"""Default limit. Larger caches do not help wide targets: new samples replace the held-out ones within seconds."""


class SampleCache:
    """At most `max_bytes` of tensors. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._samples: OrderedDict[str, Sample] = OrderedDict()
        self._lock = threading.Lock()
        self.num_bytes = 0

    def get(self, trace_id: str) -> Sample | None:
        with self._lock:
            if trace_id in self._samples:
                self._samples.move_to_end(trace_id)
            return self._samples.get(trace_id)

    def put(self, sample: Sample) -> None:
        """Add a sample, unless it is larger than the cache."""
        with self._lock:
            self._discard(sample.trace_id)
            self._samples[sample.trace_id] = sample
            self.num_bytes += sample.num_bytes
            while self.num_bytes > self.max_bytes:
                _, oldest = self._samples.popitem(last=False)
                self.num_bytes -= oldest.num_bytes

    def discard(self, trace_id: str) -> None:
        with self._lock:
            self._discard(trace_id)

    def _discard(self, trace_id: str) -> None:
        if sample := self._samples.pop(trace_id, None):
            self.num_bytes -= sample.num_bytes
