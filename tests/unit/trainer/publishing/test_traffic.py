"""Shifts of the traffic are seen once each, and stored requests are counted by kind and age."""

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest

from updraft_trainer.data.retention import Pool, SampleEntry
from updraft_trainer.data.selection import NUM_RECENT, outliers_together, traffic_mix
from updraft_trainer.publishing.traffic import ShiftDetector, kinds, label

_SECOND_MS, _HOUR_MS = 1000, 3_600_000


def requests(clusters: Sequence[str], *, every_ms: int = _SECOND_MS) -> list[SampleEntry]:
    """One request after the other, of these clusters; every tenth is held out."""
    return [
        SampleEntry(
            trace_id=f"trace-{i}",
            order=i,
            cluster=cluster,
            pool=Pool.EVALUATION if i % 10 == 9 else Pool.WINDOW,
            num_bytes=1,
            num_tokens=1,
            finished_ms=i * every_ms,
        )
        for i, cluster in enumerate(clusters)
    ]


def test_a_shift_is_seen_once_and_dated_by_its_first_requests() -> None:
    detector = ShiftDetector()
    detector.follow(requests(["domain:code"] * 200 + ["domain:math"] * 200))
    (shift,) = detector.shifts
    assert (shift.before, shift.after) == ("domain:code", "domain:math")
    assert shift.at_ms == 200 * _SECOND_MS


def test_a_shift_back_is_another_one() -> None:
    detector = ShiftDetector()
    detector.follow(requests((["domain:code"] * 150 + ["domain:math"] * 150) * 2))
    assert [shift.after for shift in detector.shifts] == ["domain:math", "domain:code", "domain:math"]


@pytest.mark.parametrize("seed", range(5))
def test_chance_in_a_mix_that_stays_is_no_shift(seed: int) -> None:
    names, rng = [f"domain:{number}" for number in range(5)], Random(seed)
    detector = ShiftDetector()
    detector.follow(requests([rng.choice(names) for _ in range(2000)]))
    assert list(detector.shifts) == []


def test_chunks_of_one_request_count_once() -> None:
    entries = requests(["domain:code"] * 100)
    last = requests(["domain:math"])[0]
    chunks = [
        SampleEntry(
            trace_id=f"long#{i}", order=100 + i, cluster=last.cluster, pool=Pool.WINDOW, num_bytes=1, num_tokens=1
        )
        for i in range(NUM_RECENT)
    ]
    detector = ShiftDetector()
    detector.follow([*entries, *chunks])
    assert list(detector.shifts) == []


def test_it_does_not_matter_in_how_many_parts_requests_come() -> None:
    entries, whole, parts = requests(["a:1"] * 100 + ["a:2"] * 100), ShiftDetector(), ShiftDetector()
    whole.follow(entries)
    for num in range(len(entries) + 1):
        parts.follow(entries[:num])
    assert whole.shifts == parts.shifts
    assert len(parts.shifts) == 1


def test_a_kind_that_was_there_before_is_dated_by_its_growth() -> None:
    rng = Random(1)
    clusters = ["domain:code" if rng.random() < share else "domain:math" for share in (0.2, 0.95) for _ in range(1000)]
    detector = ShiftDetector()
    detector.follow(requests(clusters))
    (shift,) = detector.shifts
    assert shift.after == "domain:code"
    assert 995 <= shift.at_ms / _SECOND_MS <= 1010


def test_what_is_kept_of_older_requests_is_no_shift_for_a_new_process() -> None:
    """Reservoirs and the held-out pool hold equal bytes of each kind, whatever the traffic was."""
    names, rng = ["domain:a", "domain:b", "domain:c", "domain:d"], Random(2)
    older = [replace(entry, pool=Pool.RESERVOIR) for entry in requests(names * 100)]
    newer = requests(["domain:a" if rng.random() < 0.85 else rng.choice(names[1:]) for _ in range(500)])
    detector = ShiftDetector()
    detector.follow([*older, *(replace(entry, order=entry.order + len(older)) for entry in newer)])
    assert list(detector.shifts) == []


def test_requests_that_are_like_no_others_make_no_shift() -> None:
    detector = ShiftDetector()
    detector.follow(outliers_together(requests([f"content:{number}" for number in range(1000)])))
    assert list(detector.shifts) == []


def test_stored_requests_are_counted_by_kind_and_age() -> None:
    entries = requests(["domain:code"] * 40 + ["domain:math"] * 20, every_ms=_HOUR_MS // 2)
    code, math = kinds(entries, traffic_mix(entries))
    assert (code.name, code.training, code.held_out, code.last_hour, code.last_day) == ("domain:code", 36, 4, 0, 29)
    assert (math.name, math.training, math.held_out, math.last_hour, math.last_day) == ("domain:math", 18, 2, 3, 20)
    assert code.recent_share + math.recent_share == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "shown"),
    [("domain:code", "code"), ("content:17", "unnamed 17"), ("outliers", "others"), ("domain:a\x1b[2J", "a [2J")],
)
def test_a_kind_is_shown_as_one_printable_line(name: str, shown: str) -> None:
    assert label(name) == shown
