"""The terms of a rollout: one enum per enum of registry.proto.

A member has the name of its constant there (`Phase.ROLLED_BACK` is PHASE_ROLLED_BACK); its value is what people read.
"""

from enum import StrEnum
from typing import Self

from updraft.registry.v1 import registry_pb2 as pb


class Term(StrEnum):
    """A constant of registry.proto."""

    def to_proto(self) -> int:
        """Number on the wire."""
        raise NotImplementedError

    @classmethod
    def from_proto(cls, number: int) -> Self | None:
        """Member for a number on the wire; None if the number is not known here."""
        return next((term for term in cls if term.to_proto() == number), None)


class Phase(Term):
    """Phase of a version in its life."""

    PENDING = "Pending"
    HELD = "Held"
    CANARY = "Canary"
    STABLE = "Stable"
    SUPERSEDED = "Superseded"
    REJECTED = "Rejected"
    ROLLED_BACK = "RolledBack"
    FAILED = "Failed"

    def to_proto(self) -> pb.Phase.ValueType:
        return pb.Phase.Value(f"PHASE_{self.name}")

    @property
    def is_condemned(self) -> bool:
        """The version lost or could not be loaded. It never serves again."""
        return self in (Phase.REJECTED, Phase.ROLLED_BACK, Phase.FAILED)

    @property
    def is_waiting(self) -> bool:
        """No decision was made yet."""
        return self in (Phase.PENDING, Phase.HELD)


class Source(Term):
    """Origin of a version."""

    INITIAL = "Initial"
    TRAINER = "Trainer"
    IMPORTED = "Imported"

    def to_proto(self) -> pb.Source.ValueType:
        return pb.Source.Value(f"SOURCE_{self.name}")


class Strategy(Term):
    """How a version that passed the offline gate reaches the pods."""

    CANARY = "Canary"
    """Some pods serve it first. All pods serve it once it has won there."""
    IMMEDIATE = "Immediate"
    """All pods serve it at once."""
    MANUAL = "Manual"
    """It waits until a person promotes it."""

    def to_proto(self) -> pb.Strategy.ValueType:
        return pb.Strategy.Value(f"STRATEGY_{self.name}")


class Comparison(Term):
    """How candidate and stable version are compared on live traffic."""

    AUTO = "Auto"
    """SWITCHBACK while at most two pods are connected when the canary begins, otherwise PODS."""
    PODS = "Pods"
    """Some pods serve the candidate while the others serve the stable version."""
    SWITCHBACK = "Switchback"
    """Each pod of the canary alternates between both versions, so that it is its own control."""

    def to_proto(self) -> pb.Comparison.ValueType:
        return pb.COMPARISON_UNSPECIFIED if self is Comparison.AUTO else pb.Comparison.Value(f"COMPARISON_{self.name}")


class OnInconclusive(Term):
    """Action for a canary that has no verdict at its progress deadline."""

    PAUSE = "Pause"
    """It stays where it is until a person decides."""
    ROLLBACK = "Rollback"
    """It is rolled back."""
    PROMOTE = "Promote"
    """It is promoted."""

    def to_proto(self) -> pb.OnInconclusive.ValueType:
        return pb.OnInconclusive.Value(f"ON_INCONCLUSIVE_{self.name}")
