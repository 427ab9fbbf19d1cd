"""Reads the fields of a report, and refuses what no report can say."""

import math
from contextlib import suppress
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from updraft.fleet.v1 import fleet_pb2
from updraft.registry.v1 import registry_pb2
from updraft_chassis.errors import InvalidInput
from updraft_registry.messages.reports import Totals, read
from updraft_registry.rollout.traffic import Traffic

IDENTITY = fleet_pb2.PodIdentity(speculator="default", pod="pod-0")
COUNTERS = fleet_pb2.VersionCounters


def test_traffic_is_read_as_sums() -> None:
    latency = fleet_pb2.Histogram(bounds=[0.1], counts=[7, 3], sum=1.5)
    counters = COUNTERS(version=2, requests_served=4, verify_steps=5, tokens=10, errors=1, inter_token_latency=latency)
    report = read(fleet_pb2.PodReport(identity=IDENTITY, versions=[counters]))
    assert report.pod.traffic == {
        2: Traffic(requests=4, verify_steps=5, tokens=10, latency_s=1.5, latency_tokens=10, errors=1)
    }


@pytest.mark.attack(
    boundary="text",
    attack="a pod's reason with escape sequences",
    outcome="it becomes one printable line",
)
def test_what_a_pod_says_of_a_refusal_is_one_line_of_text() -> None:
    status = fleet_pb2.DirectiveStatus(outcome=fleet_pb2.OUTCOME_NACK, version=2, reason="bad\n\x1b[31m" + "x" * 999)
    report = read(fleet_pb2.PodReport(identity=IDENTITY, status=status))
    assert report.pod.refusal == "bad  [31m" + "x" * 491


@pytest.mark.parametrize(("outcome", "trouble"), [("PENDING", "not yet: disk full"), ("ACK", ""), ("NACK", "")])
def test_what_keeps_a_pod_from_following_is_its_own_trouble(outcome: str, trouble: str) -> None:
    status = fleet_pb2.DirectiveStatus(
        outcome=fleet_pb2.Outcome.Value(f"OUTCOME_{outcome}"), reason="not yet: disk full"
    )
    assert read(fleet_pb2.PodReport(identity=IDENTITY, status=status)).pod.trouble == trouble


def counters(version: int, steps: int, accepted: list[int]) -> fleet_pb2.VersionCounters:
    return fleet_pb2.VersionCounters(
        version=version,
        verify_steps=steps,
        tokens=2 * steps,
        proposed=3 * steps,
        proposed_by_position=[steps] * (len(accepted) + 1),
        accepted_by_position=accepted,
    )


def test_traffic_is_summed_over_the_last_reports_by_version_newest_first() -> None:
    one = read(fleet_pb2.PodReport(identity=IDENTITY, versions=[counters(1, 10, [5]), counters(2, 4, [3, 1])]))
    two = read(fleet_pb2.PodReport(identity=IDENTITY, versions=[counters(2, 6, [4, 2, 1])]))
    totals = Totals()
    totals.add(one)
    totals.add(two)
    newest, oldest = totals.traffic()
    assert (newest.version, newest.verify_steps, newest.tokens, newest.proposed) == (2, 10, 20, 30)
    assert list(newest.accepted_by_position) == [7, 3, 1]
    assert list(newest.proposed_by_position) == [10, 10, 10, 6], "positions differ where k differed"
    assert (oldest.version, oldest.verify_steps) == (1, 10)
    totals.take_out(one)
    (left,) = totals.traffic()
    assert (left.version, left.verify_steps, list(left.accepted_by_position)) == (2, 6, [4, 2, 1])
    totals.take_out(two)
    assert totals.traffic() == []


def domain(name: str, steps: int = 1) -> registry_pb2.DomainTraffic:
    return registry_pb2.DomainTraffic(domain=name, requests=1, verify_steps=steps, tokens=2)


def test_the_largest_domains_of_all_pods_are_named_and_the_rest_is_other() -> None:
    totals = Totals()
    reports = []
    for pod, names in (("pod-0", range(16)), ("pod-1", range(8, 24))):
        domains = [*(domain(f"d{n:02}", 100 - n) for n in names), domain("other", 7)]
        message = fleet_pb2.PodReport(identity=IDENTITY, versions=[COUNTERS(version=2, domains=domains)])
        message.identity.pod = pod
        reports.append(read(message))
        totals.add(reports[-1])
    (traffic,) = totals.traffic()
    shown = {counted.domain: counted.verify_steps for counted in traffic.domains}
    assert list(shown)[:9] == ["d08", "d09", "d10", "d11", "d12", "d13", "d14", "d15", "d00"]
    assert len(shown) == 17
    assert shown["other"] == 7 + 7 + sum(100 - n for n in range(16, 24))
    for report in reports:
        totals.take_out(report)
    assert totals.traffic() == []


def latencies(sum_s: float, tokens: int) -> fleet_pb2.VersionCounters:
    return COUNTERS(version=3, inter_token_latency=fleet_pb2.Histogram(counts=[tokens], sum=sum_s))


@pytest.mark.attack(
    boundary="evidence",
    attack="counters, latencies and names that cannot be",
    outcome="the stream is ended with the reason",
)
@pytest.mark.parametrize(
    ("change", "why"),
    [
        pytest.param(
            {"identity": fleet_pb2.PodIdentity(speculator="../x", pod="p")},
            "not a valid speculator name",
            id="speculator",
        ),
        pytest.param({"identity": fleet_pb2.PodIdentity(speculator="default")}, "1 to 253", id="no pod"),
        pytest.param(
            {"identity": fleet_pb2.PodIdentity(speculator="default", pod="p\x1b[2J")}, "1 to 253", id="escape"
        ),
        pytest.param({"prefetched_versions": range(65)}, "more than 64 versions", id="versions"),
        pytest.param({"versions": [COUNTERS(accepted_by_position=[1] * 65)]}, "more than 64 draft", id="accepted"),
        pytest.param({"versions": [COUNTERS(proposed_by_position=[1] * 65)]}, "more than 64 draft", id="proposed"),
        pytest.param({"versions": [COUNTERS(version=3, tokens=2**48 + 1)]}, "of version 3", id="tokens"),
        pytest.param({"versions": [COUNTERS(version=3, requests_served=2**49)]}, "of version 3", id="requests"),
        pytest.param({"versions": [COUNTERS(proposed_by_position=[2**60])]}, "of version 0", id="position"),
        pytest.param({"versions": [latencies(1e306, 100)]}, "100 tokens of version 3 sum up to 1e\\+306", id="ages"),
        pytest.param(
            {"versions": [latencies(360_001, 100)]}, "expected 1e-09 to 3600 s per token", id="more than an hour"
        ),
        pytest.param({"versions": [latencies(5e-324, 18)]}, "18 tokens of version 3 sum up to", id="no time"),
        pytest.param({"versions": [latencies(1.0, 0)]}, "0 tokens of version 3 sum up to 1 s", id="of no tokens"),
        pytest.param(
            {"versions": [COUNTERS(inter_token_latency=fleet_pb2.Histogram(sum=math.nan))]}, "sum up to nan", id="nan"
        ),
        pytest.param(
            {"versions": [COUNTERS(inter_token_latency=fleet_pb2.Histogram(sum=-1.0))]}, "sum up to -1", id="negative"
        ),
        pytest.param(
            {"versions": [COUNTERS(inter_token_latency=fleet_pb2.Histogram(counts=[1] * 257))]},
            "more than 256 buckets",
            id="buckets",
        ),
        pytest.param(
            {"versions": [COUNTERS(inter_token_latency=fleet_pb2.Histogram(counts=[2**47, 2**48]))]},
            "a counter of version 0",
            id="latency count",
        ),
        pytest.param(
            {"versions": [COUNTERS(domains=[domain("a\x1b[2J")])]}, "printable characters", id="domain escape"
        ),
        pytest.param({"versions": [COUNTERS(domains=[domain("")])]}, "1 to 64", id="domain without a name"),
        pytest.param({"versions": [COUNTERS(domains=[domain("x" * 65)])]}, "1 to 64", id="long domain"),
        pytest.param(
            {"versions": [COUNTERS(domains=[domain(str(n)) for n in range(33)])]}, "more than 32 domains", id="domains"
        ),
        pytest.param({"versions": [COUNTERS(version=3, domains=[domain("a", 2**49)])]}, "of version 3", id="in domain"),
        pytest.param({"capture": fleet_pb2.CaptureCounters(dropped={"x" * 70_000: 1})}, "a report of 70", id="large"),
    ],
)
def test_a_report_that_cannot_be_is_refused(change: dict[str, Any], why: str) -> None:
    bad = fleet_pb2.PodReport(**({"identity": IDENTITY} | change))
    with pytest.raises(InvalidInput, match=why):
        read(bad)


def test_a_report_at_its_limits_is_taken() -> None:
    most = fleet_pb2.PodReport(identity=IDENTITY, prefetched_versions=range(64))
    for number in range(64):
        latency = fleet_pb2.Histogram(bounds=range(17), counts=[1] * 17, sum=1.0)
        most.versions.add(
            version=number,
            verify_steps=2**48 // 65 + 1,
            tokens=2**48,
            accepted_by_position=[9] * 64,
            proposed_by_position=[9] * 64,
            inter_token_latency=latency,
        )
    assert len(read(most).drafted) == 64


@pytest.mark.parametrize("sum_s", [0.0, 2e-7, 360_000.0])
def test_latencies_that_can_be_are_taken(sum_s: float) -> None:
    assert (
        read(fleet_pb2.PodReport(identity=IDENTITY, versions=[latencies(sum_s, 100)])).pod.traffic[3].latency_s == sum_s
    )


@given(st.binary(max_size=300))
def test_any_bytes_that_parse_are_taken_or_refused_in_a_sentence(data: bytes) -> None:
    report = fleet_pb2.PodReport()
    with suppress(DecodeError, InvalidInput):
        report.ParseFromString(data)
        read(report)
