"""Maintenance windows, such as "Sat,Sun 22:30-04:00 Europe/Berlin": whether one is open, and when the next one opens.

A window whose end is not after its start ends on the next day. Local times follow the rules of their time zone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from updraft_chassis.errors import InvalidInput

DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    days: tuple[str, ...]
    """Those on which it starts."""
    start: time
    end: time
    zone: ZoneInfo

    @classmethod
    def read(cls, text: str) -> "Window":
        """Raises InvalidInput for a day or a time zone that does not exist; the API server checks the rest."""
        words = text.split()
        days = DAYS if words[0][0].isdigit() else tuple(words.pop(0).split(","))
        if unknown := next((day for day in days if day not in DAYS), None):
            raise InvalidInput(f"spec.updatePolicy.windows: {unknown} in {text!r} is none of {', '.join(DAYS)}")
        start, end = map(time.fromisoformat, words[0].split("-"))
        name = words[1] if len(words) > 1 else "UTC"
        try:
            return cls(days=days, start=start, end=end, zone=ZoneInfo(name))
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise InvalidInput(f"spec.updatePolicy.windows: there is no time zone {name}") from error

    def times(self, now: datetime) -> Iterator[tuple[datetime, datetime]]:
        """Starts and ends in UTC: from the one that may still be open, over a week."""
        today = now.astimezone(self.zone).date()
        for day in (today + timedelta(days=offset) for offset in range(-2, 9)):
            if DAYS[day.weekday()] in self.days:
                last = day if self.end > self.start else day + timedelta(days=1)
                length = datetime.combine(last, self.end) - datetime.combine(day, self.start)
                start = datetime.combine(day, self.start, self.zone).astimezone(UTC)
                end = datetime.combine(last, self.end, self.zone).astimezone(UTC)
                yield start, end if end > start else start + length  # the clock skips it or goes back over it


def is_open(windows: Sequence[Window], now: datetime) -> bool:
    """Always without windows."""
    return not windows or any(start <= now < end for window in windows for start, end in window.times(now))


def next_opening(windows: Sequence[Window], now: datetime) -> datetime | None:
    """None without windows."""
    return min((start for window in windows for start, _ in window.times(now) if start > now), default=None)
