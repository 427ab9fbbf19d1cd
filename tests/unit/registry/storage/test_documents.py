"""Documents: what is written is read back, and what was written by nobody is refused in a sentence."""

import json
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.archives import POLICY
from tests.support.checkpoints import draft, evaluation
from tests.support.versions import NOW_MS

from updraft.registry.v1 import registry_pb2
from updraft_chassis.errors import InvalidInput
from updraft_registry.messages import wire
from updraft_registry.rollout.version import DesiredState
from updraft_registry.storage.catalogue import Catalogue, published
from updraft_registry.storage.documents import (
    read_speculator,
    read_version,
    speculator_document,
    version_document,
)
from updraft_registry.storage.tenants import TenantRecord

TENANTS = TenantRecord(salt=bytes(range(32)), forgotten={2**64 - 1: NOW_MS, 1: NOW_MS + 1})
MANIFEST = draft(1).manifest(evaluation=evaluation(num_samples=2))
VERSION = wire.pending(MANIFEST, 1, NOW_MS)
DOCUMENT: dict[str, Any] = json.loads(version_document(VERSION, MANIFEST, {7: published(VERSION)}))

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


def test_a_version_is_read_back_with_its_history() -> None:
    read = read_version(json.dumps(DOCUMENT).encode(), "default", 1)
    assert read == (VERSION, MANIFEST, {7: published(VERSION)})


def test_the_desired_state_is_read_back() -> None:
    desired = DesiredState(pinned=0, pin_reason="slow", is_paused=True, pause_reason="lunch")
    policy = registry_pb2.RolloutPolicy(revision_history_limit=3, auto_rollback=False)
    read, _, tenants = read_speculator(speculator_document("default", desired, policy, {}, TENANTS), "default")
    assert tenants == TENANTS
    assert read.HasField("pinned")
    assert (read.pinned, read.pin_reason) == (0, "slow")
    assert (read.paused, read.pause_reason) == (True, "lunch")
    assert read.policy == policy
    unpinned, _, tenants = read_speculator(
        speculator_document("default", DesiredState(), policy, {}, TenantRecord()), "default"
    )
    assert tenants == TenantRecord()
    assert not unpinned.HasField("pinned")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        pytest.param({"version": 2}, "it belongs to version 2", id="another place"),
        pytest.param({"history": [{"id": 1}]}, "not a document", id="half an event"),
        pytest.param({"proven_ms": 2**70}, "out of range", id="number"),
        pytest.param(
            {"history": [DOCUMENT["history"][0] | {"number": 9}]}, "belongs to another version", id="another history"
        ),
        pytest.param({"history": [DOCUMENT["history"][0] | {"id": 2**63}]}, "out of range", id="event number"),
        pytest.param(
            {"history": [DOCUMENT["history"][0] | {"reason": "\ud800"}]}, "not a document", id="half a character"
        ),
        pytest.param({"history": [DOCUMENT["history"][0] | {"actor": "nobody"}]}, "not a document", id="actor"),
        pytest.param({"tenants": {"salt": "00"}}, "tenants are damaged", id="salt"),
        pytest.param({"tenants": {"forgotten": {"acme": 1}}}, "tenants are damaged", id="tenant"),
        pytest.param({"tenants": []}, "not a document", id="no tenants"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        read_version(json.dumps(DOCUMENT | change).encode(), "default", 1)


@settings(deadline=None)
@given(data=st.data())
def test_whatever_is_in_a_document_it_is_refused_or_makes_a_row(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    field = data.draw(st.sampled_from([*DOCUMENT, *DOCUMENT["manifest"], *DOCUMENT["history"][0]]))
    value = data.draw(JSON)
    content = json.loads(json.dumps(DOCUMENT))
    holder = next(part for part in (content, content["manifest"], content["history"][0]) if field in part)
    holder[field] = value
    path: Path = tmp_path_factory.mktemp("catalogue") / "catalogue.sqlite3"
    with suppress(InvalidInput):
        version, manifest, history = read_version(json.dumps(content).encode(), "default", 1)
        with closing(Catalogue(path, defaults=POLICY)) as catalogue:
            catalogue.add(version, manifest, history)
            assert catalogue.speculator("default").versions == (version,)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    for read in (lambda: read_version(content, "default", 1), lambda: read_speculator(content, "default")):
        with suppress(InvalidInput):
            read()
