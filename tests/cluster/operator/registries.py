"""The registry's side of a test: drafts that are published as a trainer does it, and what the registry holds."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from tests.support.checkpoints import draft, evaluation
from tests.support.registry import CALL_S, Registry, parts

from updraft.registry.v1 import registry_pb2 as pb
from updraft.registry.v1.registry_pb2_grpc import RegistryStub


class Shelf:
    """The drafts of one speculator."""

    def __init__(self, registry: Registry, speculator: str) -> None:
        self.address = registry.address
        self.speculator = speculator

    def publish(self, number: int, *, gain: float = 1.5) -> int:
        """A draft that was evaluated against the one before it; the first serves at once. Return its version."""
        shown = evaluation(baseline=number - 1, gain=gain) if number > 1 else None
        source = pb.SOURCE_TRAINER if number > 1 else pb.SOURCE_INITIAL
        learned = pb.Provenance(samples=100 * number, first_trace_id="a", last_trace_id="b")
        weights = draft(seed=number)
        manifest = weights.manifest(
            self.speculator, source=source, parent_version=number - 1, evaluation=shown, provenance=learned
        )
        with self._stub() as stub:
            answer = stub.Publish(iter(parts(manifest, weights.data)), timeout=CALL_S)
        return int(answer.version.version)

    def state(self) -> pb.SpeculatorState:
        """What the registry decided."""
        with self._stub() as stub:
            for answer in stub.Watch(pb.WatchRequest(speculator=self.speculator), timeout=CALL_S):
                state: pb.SpeculatorState = answer.state
                return state
        raise AssertionError("the watch ended without a state")

    def versions(self) -> dict[int, pb.Version]:
        """What it keeps."""
        with self._stub() as stub:
            listed = stub.List(pb.ListRequest(speculator=self.speculator), timeout=CALL_S)
        return {each.version: each for each in listed.versions}

    @contextmanager
    def _stub(self) -> Iterator[Any]:
        with grpc.insecure_channel(self.address) as channel:
            yield RegistryStub(channel)
