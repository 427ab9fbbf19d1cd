"""What simulated pods of one process know of weights, so that a thousand of them hold each version once.

Nothing is believed before its digest matches: the first pod decodes and hashes, the others compare what they receive with
that, byte by byte, and keep none of it. They wait for as long as the first one's work took: each would do it on a machine of
its own.
"""

import hashlib
import io
import time
from collections import Counter
from dataclasses import dataclass, field

from updraft.registry.v1 import registry_pb2 as pb
from updraft_artifacts import delta
from updraft_chassis.errors import Corrupt

_MAX_KNOWN = 8


@dataclass(slots=True)
class Library:
    """What the pods of this process have verified, and what they received, by encoding."""

    weights: dict[str, bytes] = field(default_factory=dict)
    """By digest."""
    deltas: dict[tuple[str, str], bytes] = field(default_factory=dict)
    """By the digests of base and result."""
    received: Counter[str] = field(default_factory=Counter)
    """Bytes."""
    fetches: Counter[str] = field(default_factory=Counter)
    verify_s: float = 0.0
    """What it took last to decode and hash a version."""

    def find(self, base: str, digest: str, *, is_delta: bool) -> bytes | None:
        """The bytes that lead to a version, where they were verified."""
        return self.deltas.get((base, digest)) if is_delta else self.weights.get(digest)

    def learn(self, base: str, digest: str, weights: bytes, encoded: bytes) -> None:
        """Keep what was verified, and let go of what came long before."""
        self.weights[digest] = weights
        if encoded:
            self.deltas[base, digest] = encoded
        for known in (self.weights, self.deltas):
            while len(known) > _MAX_KNOWN:
                known.pop(next(iter(known)))  # type: ignore[call-overload] # the keys are of two kinds


class Arrival:
    """What one fetch brings."""

    def __init__(self, library: Library, *, base: str, digest: str) -> None:
        self._library = library
        self._base = base
        self._digest = digest
        self._is_delta = False
        self._size_bytes = 0
        self._offset = 0
        self._expected: bytes | None = None
        self._chunks: list[bytes] = []

    def take(self, response: pb.FetchResponse) -> None:
        """One message; Corrupt if it is not what is known to be right."""
        if response.HasField("start"):
            self._begin(response.start)
            return
        data = response.chunk.data
        if not data:  # the registry says that our turn will come
            return
        if response.chunk.offset != self._offset:
            raise Corrupt(f"a chunk at {response.chunk.offset}, expected {self._offset}")
        if self._expected is None:
            self._chunks.append(data)
        elif data != self._expected[self._offset : self._offset + len(data)]:
            raise Corrupt(f"the bytes at {self._offset} are not those of {self._digest}")
        self._offset += len(data)
        self._library.received[self._encoding] += len(data)

    def end(self) -> float:
        """How long a pod would have to work on it yet, in seconds; Corrupt unless all came, and is right."""
        if self._offset != self._size_bytes:
            raise Corrupt(f"{self._offset} of {self._size_bytes} bytes came")
        wait_s = self._library.verify_s
        if self._expected is None:
            data = b"".join(self._chunks)
            if data != self._library.find(self._base, self._digest, is_delta=self._is_delta):  # known by now?
                started_s, wait_s = time.perf_counter(), 0.0
                self._verify(data)
                self._library.verify_s = time.perf_counter() - started_s
        self._library.fetches[self._encoding] += 1
        return wait_s

    @property
    def _encoding(self) -> str:
        return "delta" if self._is_delta else "identity"

    def _begin(self, start: pb.FetchResponse.Start) -> None:
        if start.digest != self._digest or start.redirect_uri:
            raise Corrupt(f"the registry announces {start}, expected {self._digest}")
        self._is_delta = start.encoding == pb.ENCODING_DELTA_ZSTD
        self._size_bytes = start.size_bytes
        self._expected = self._library.find(self._base, self._digest, is_delta=self._is_delta)

    def _verify(self, data: bytes) -> None:
        weights = self._decode(data) if self._is_delta else data
        found = f"sha256:{hashlib.sha256(weights).hexdigest()}"
        if found != self._digest:
            raise Corrupt(f"the weights hash to {found}, expected {self._digest}")
        self._library.learn(self._base, self._digest, weights, data if self._is_delta else b"")

    def _decode(self, data: bytes) -> bytes:
        base, result = self._library.weights[self._base], io.BytesIO()
        header = delta.Header.read(io.BytesIO(data))
        if (header.base_digest, header.result_digest) != (self._base, self._digest):
            raise Corrupt(f"the delta is {header}")
        delta.decode(io.BytesIO(data), io.BytesIO(base), result, header)
        return result.getvalue()
