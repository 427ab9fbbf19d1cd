"""Acceptance length on live traffic: tokens per verify step."""

from updraft.registry.v1 import registry_pb2 as pb


def acceptance_length(state: pb.SpeculatorState, version: int) -> tuple[float | None, int]:
    """Acceptance length and verify steps of a version over the traffic of all connected pods; None without traffic."""
    for traffic in state.traffic:
        if traffic.version == version and traffic.verify_steps:
            return traffic.tokens / traffic.verify_steps, traffic.verify_steps
    return None, 0


def decimal(length: float | None) -> str | None:
    return None if length is None else f"{length:.2f}"
