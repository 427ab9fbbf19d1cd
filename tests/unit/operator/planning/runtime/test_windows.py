"""Windows open at local times, across midnight and changes of the clock."""

from datetime import UTC, datetime

import pytest

from updraft_chassis.errors import InvalidInput
from updraft_operator.planning.runtime.windows import Window, is_open, next_opening


def _at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("window", "now", "opens"),
    [
        pytest.param("22:30-04:00", "2026-11-25T22:30", True, id="at its start"),
        pytest.param("22:30-04:00", "2026-11-26T03:59", True, id="after midnight"),
        pytest.param("22:30-04:00", "2026-11-26T04:00", False, id="at its end"),
        pytest.param("01:00-05:00 Europe/Berlin", "2026-11-25T00:30", True, id="in winter Berlin is an hour ahead"),
        pytest.param("01:00-05:00 Europe/Berlin", "2026-07-25T23:30", True, id="in summer two"),
        pytest.param("Sat,Sun 22:00-02:00", "2026-11-30T01:00", True, id="Monday, since Sunday"),
        pytest.param("Sat,Sun 22:00-02:00", "2026-11-30T22:30", False, id="Monday"),
        pytest.param("00:00-00:00", "2026-11-30T22:30", True, id="the whole day"),
    ],
)
def test_a_window_is_open_from_its_start_to_its_end(window: str, now: str, opens: bool) -> None:  # noqa: FBT001 - a case
    assert is_open([Window.read(window)], _at(now)) is opens


def test_without_windows_it_is_always_time() -> None:
    assert is_open([], _at("2026-11-25T12:00"))
    assert next_opening([], _at("2026-11-25T12:00")) is None


@pytest.mark.parametrize(
    ("windows", "opening"),
    [
        pytest.param(["22:30-04:00"], "2026-11-25T22:30", id="today"),
        pytest.param(["Wed 11:00-12:00"], "2026-12-02T11:00", id="in a week"),
        pytest.param(["Fri 11:00-12:00", "Thu 02:00-03:00 Asia/Tokyo"], "2026-11-25T17:00", id="the earlier one"),
    ],
)
def test_the_next_opening_is_known(windows: list[str], opening: str) -> None:
    assert next_opening([Window.read(text) for text in windows], _at("2026-11-25T12:00")) == _at(opening)


def test_a_start_that_the_clock_skips_is_an_hour_later_by_the_clock() -> None:
    skipped = Window.read("02:30-03:30 Europe/Berlin")
    assert is_open([skipped], _at("2026-03-29T01:30"))
    assert not is_open([skipped], _at("2026-03-29T01:29"))
    assert not is_open([skipped], _at("2026-03-29T02:30"))


@pytest.mark.parametrize(
    ("now", "opens"),
    [
        pytest.param("2026-03-29T01:59", True, id="3:59 in spring, after a short night"),
        pytest.param("2026-03-29T02:00", False, id="4:00 in spring"),
        pytest.param("2026-10-25T02:59", True, id="3:59 in autumn, after a long night"),
        pytest.param("2026-10-25T03:00", False, id="4:00 in autumn"),
    ],
)
def test_a_window_ends_by_the_clock_also_when_that_changes(now: str, opens: bool) -> None:  # noqa: FBT001 - a case
    assert is_open([Window.read("22:30-04:00 Europe/Berlin")], _at(now)) is opens


@pytest.mark.parametrize(
    ("text", "problem"),
    [("Son 22:00-23:00", "Son"), ("22:00-23:00 Europe/Atlantis", "Europe/Atlantis"), ("22:00-23:00 ../etc", "../etc")],
)
def test_unknown_days_and_time_zones_are_named(text: str, problem: str) -> None:
    with pytest.raises(InvalidInput, match=problem):
        Window.read(text)
