"""Copies of the catalogue in the store, to rebuild it from: one document per version, and one per speculator.

A document is a protobuf message as JSON, with the history of its subject. Transitions keep their numbers from the
catalogue, so that their order survives. Facts that can be recomputed (whether weights are kept) or measured again (the
evidence of a canary) are left out.
"""

import json
from dataclasses import asdict, replace
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message

from updraft.registry.v1 import registry_pb2
from updraft_chassis.errors import InvalidInput
from updraft_chassis.tenants import hashes
from updraft_registry.messages import admission, wire
from updraft_registry.rollout.version import NO_DRAFT, DesiredState, Version
from updraft_registry.storage.catalogue import History, parse_transition
from updraft_registry.storage.tenants import TenantRecord
from updraft_rollouts.terms import Phase

SPECULATOR = NO_DRAFT
"""Number of the speculator's own document."""

MAX_EVENTS = 1000
"""Maximum of events in a document, which is rewritten for each event."""


def version_document(version: Version, manifest: registry_pb2.Manifest, history: History) -> bytes:
    message = wire.version_to_proto(version, manifest)
    message.ClearField("pruned")
    return _write(message, history, proven_ms=version.proven_ms)


def speculator_document(
    name: str, desired: DesiredState, policy: registry_pb2.RolloutPolicy, history: History, tenants: TenantRecord
) -> bytes:
    """The document of a speculator; `policy` as it was set."""
    message = registry_pb2.SpeculatorState(
        speculator=name,
        pinned=desired.pinned,
        pin_reason=desired.pin_reason,
        paused=desired.is_paused,
        pause_reason=desired.pause_reason,
        policy=policy,
    )
    if not tenants.salt:
        return _write(message, history)
    forgotten = {hashes.text(tenant): at_ms for tenant, at_ms in tenants.forgotten.items()}
    return _write(message, history, tenants={"salt": tenants.salt.hex(), "forgotten": forgotten})


def read_version(content: bytes, name: str, number: int) -> tuple[Version, registry_pb2.Manifest, History]:
    """Parse the document of a version; InvalidInput if it is damaged or misplaced."""
    message = registry_pb2.Version()
    history, facts = _read(content, message, number)
    if (message.manifest.speculator, message.version) != (name, number):
        raise InvalidInput(f"it belongs to version {message.version} of {message.manifest.speculator!r}")
    admission.check_manifest(message.manifest, max_bytes=message.manifest.size_bytes)
    version = wire.version_from_proto(message)
    # Documents of the first release lack it. A stable version counts as a winner then.
    stable_since_ms = version.since_ms if version.phase is Phase.STABLE else 0
    version = replace(version, proven_ms=facts.get("proven_ms", stable_since_ms))
    return version, message.manifest, history


def read_speculator(content: bytes, name: str) -> tuple[registry_pb2.SpeculatorState, History, TenantRecord]:
    """Parse the document of a speculator: its desired state and tenants. InvalidInput if it is damaged or misplaced."""
    desired = registry_pb2.SpeculatorState()
    history, facts = _read(content, desired, SPECULATOR)
    if desired.speculator != admission.check_name(name):
        raise InvalidInput(f"it belongs to {desired.speculator!r}")
    return desired, history, facts["tenants"]


def _write(message: Message, history: History, **facts: object) -> bytes:
    content = json_format.MessageToDict(message, preserving_proto_field_name=True) | facts
    content["history"] = [{"id": number} | asdict(event) for number, event in sorted(history.items())]
    return json.dumps(content, indent=1).encode()


def _read(content: bytes, message: Message, number: int) -> tuple[History, dict[str, Any]]:
    """Fill the message; return the history, and facts without a field in the message."""
    try:
        parsed = json.loads(content)
        json.dumps(parsed, ensure_ascii=False).encode()  # lone surrogates are valid in JSON only
        events = {_integer(event["id"]): parse_transition(event) for event in parsed.pop("history", [])}
        facts: dict[str, Any] = {name: _integer(parsed.pop(name)) for name in ("proven_ms",) if name in parsed}
        facts["tenants"] = _tenants(parsed.pop("tenants", {}))
        json_format.ParseDict(parsed, message, ignore_unknown_fields=True)
        for event in events.values():
            _integer(event.at_ms)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, json_format.ParseError) as error:
        raise InvalidInput(f"it is not a document of the registry: {error}") from None
    if any(event.number != number for event in events.values()):
        raise InvalidInput("its history belongs to another version")
    return events, facts


def _tenants(parsed: Any) -> TenantRecord:
    """Documents of earlier releases have none; ValueError, TypeError or AttributeError if they are invalid."""
    salt = bytes.fromhex(parsed.get("salt", ""))
    forgotten = {hashes.parse(tenant): _integer(at_ms) for tenant, at_ms in parsed.get("forgotten", {}).items()}
    if 0 in forgotten or len(salt) not in (0, hashes.SALT_BYTES):
        raise ValueError("its tenants are damaged")
    return TenantRecord(salt=salt, forgotten=forgotten)


def _integer(value: Any) -> int:
    """An integer that fits into the catalogue; ValueError otherwise."""
    number = int(value)
    if not 0 <= number < 2**62:
        raise ValueError(f"{value} is out of range")
    return number
