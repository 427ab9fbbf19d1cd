"""A pod's last report as a message for those who look at the fleet."""

from dataclasses import asdict

from updraft.registry.v1 import registry_pb2
from updraft_registry.messages.reports import Report
from updraft_registry.rollout.placement import Pod


def state_to_proto(report: Report, pod: Pod, *, reported_ms: int) -> registry_pb2.PodState:
    """Message without traffic. `pod` is that of the report, with its connection."""
    return registry_pb2.PodState(
        pod=pod.name,
        engine=report.engine,
        device=report.device,
        loaded=pod.loaded,
        tensors_digest=pod.tensors_digest,
        prefetched_versions=sorted(pod.prefetched),
        refused=pod.refused,
        problem=pod.refusal or pod.trouble,
        waits_for_restart=pod.waits_for_restart,
        draining=pod.is_draining,
        connected=pod.is_connected,
        last_report_unix_ms=reported_ms,
        running_requests=report.running_requests,
        swaps=report.swaps.swapped,
        refused_swaps=report.swaps.refused,
        swap_pause_seconds=report.swaps.pause_s,
        capture_problem=report.capture_problem,
        speedup=None if pod.speedup is None else registry_pb2.Speedup(**asdict(pod.speedup)),
    )
