"""Acceptance length on live traffic: tokens a verify step."""

from updraft.registry.v1 import registry_pb2 as pb


def acceptance_length(state: pb.SpeculatorState, version: int) -> tuple[float | None, int]:
    """Of one version, over all that the pods which are here served with it; None: nothing. And the verify steps."""
    for traffic in state.traffic:
        if traffic.version == version and traffic.verify_steps:
            return traffic.tokens / traffic.verify_steps, traffic.verify_steps
    return None, 0


def decimal(length: float | None) -> str | None:
    """As the API wants measured values: a decimal in a string."""
    return None if length is None else f"{length:.2f}"
