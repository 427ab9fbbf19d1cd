"""A delta is made once for all that want it, kept in bounds, and only if it saves bytes."""

import asyncio
import io
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from tests.contract.store_contract import put
from tests.support.checkpoints import draft

from updraft_artifacts import delta
from updraft_registry.api.deltas import Deltas
from updraft_registry.metrics import Metrics
from updraft_registry.storage.stores.folder import FolderStore

MAX_BYTES = 10**6


@pytest.fixture
def collectors() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(collectors: CollectorRegistry) -> Metrics:
    return Metrics(collectors)


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path)


@pytest.fixture
def deltas(tmp_path: Path, store: FolderStore, metrics: Metrics) -> Iterator[Deltas]:
    made = Deltas(tmp_path / "deltas", store, max_bytes=MAX_BYTES, metrics=metrics)
    yield made
    made.close()


def weights(seed: int) -> bytes:
    return draft(seed, columns=1024).data


def count(collectors: CollectorRegistry, result: str) -> float | None:
    return collectors.get_sample_value("updraft_registry_deltas_total", {"result": result})


async def test_a_delta_leads_from_one_blob_to_the_other(deltas: Deltas, store: FolderStore) -> None:
    base, result = put(store, weights(1)), put(store, weights(2))
    assert deltas.open(base, result) is None
    await deltas.make(base, result)
    file, out = deltas.open(base, result), io.BytesIO()
    assert file is not None
    with file, store.open(base) as old:
        header = delta.Header.read(file)
        file.seek(0)
        delta.decode(file, old, out, header)
    assert out.getvalue() == weights(2)


async def test_many_that_ask_at_once_or_later_share_one(
    deltas: Deltas, store: FolderStore, collectors: CollectorRegistry
) -> None:
    base, result = put(store, weights(1)), put(store, weights(2))
    await asyncio.gather(*(deltas.make(base, result) for _ in range(20)))
    await deltas.make(base, result)
    assert count(collectors, "made") == 1


async def test_who_stops_waiting_stops_nobody_else(deltas: Deltas, store: FolderStore) -> None:
    base, result = put(store, weights(1)), put(store, weights(2))
    impatient, patient = deltas.make(base, result), deltas.make(base, result)
    impatient.cancel()
    await patient
    file = deltas.open(base, result)
    assert file is not None
    file.close()


async def test_a_delta_that_saves_nothing_is_neither_kept_nor_tried_again(
    deltas: Deltas, store: FolderStore, collectors: CollectorRegistry
) -> None:
    base, result = put(store, b"one"), put(store, b"another")
    for _ in range(2):
        await deltas.make(base, result)
        assert deltas.open(base, result) is None
    assert count(collectors, "useless") == 1


async def test_weights_that_are_gone_or_damaged_have_no_delta(
    deltas: Deltas, store: FolderStore, collectors: CollectorRegistry, tmp_path: Path
) -> None:
    base, result, other = put(store, weights(1)), put(store, weights(2)), put(store, weights(3))
    store.delete(base)
    (tmp_path / "blobs" / "sha256" / other.removeprefix("sha256:")).write_bytes(weights(4))
    for pair in ((base, result), (result, other)):
        await deltas.make(*pair)
        assert deltas.open(*pair) is None
    assert count(collectors, "failed") == 2


async def test_deltas_of_weights_that_retention_deleted_go_with_the_next_one(
    deltas: Deltas, store: FolderStore
) -> None:
    one, two, three = (put(store, weights(seed)) for seed in (1, 2, 3))
    await deltas.make(one, two)
    store.delete(one)
    await deltas.make(two, three)
    assert deltas.open(one, two) is None


async def test_deltas_are_bounded(tmp_path: Path, store: FolderStore, metrics: Metrics) -> None:
    digests = [put(store, weights(seed)) for seed in range(4)]
    deltas = Deltas(tmp_path / "deltas", store, max_bytes=len(weights(0)), metrics=metrics)
    for base, result in pairwise(digests):
        await deltas.make(base, result)
    deltas.close()
    files = list((tmp_path / "deltas").iterdir())
    assert sum(path.stat().st_size for path in files) <= len(weights(0))
    assert files


async def test_without_room_there_are_none(tmp_path: Path, store: FolderStore, metrics: Metrics) -> None:
    base, result = put(store, weights(1)), put(store, weights(2))
    deltas = Deltas(tmp_path / "deltas", store, max_bytes=0, metrics=metrics)
    await deltas.make(base, result)
    deltas.close()
    assert deltas.open(base, result) is None
