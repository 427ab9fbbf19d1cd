"""Combines the server's totals of a request with the captured steps, so that counters are exact whatever was captured. Pure.

Exception: with --speculative-adaptive the server does not report the draft length of a step, so uncaptured steps count with
the length that it was started with.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from updraft_inference.engine import UncapturedSteps, VerifyStep

_LABEL = re.compile(r"v(\d+)")


def label(version: int) -> str:
    return f"v{version}"


def version_of(label: object) -> int:
    """The version in a label; 0 for a label that is not ours, which the weights have at server startup."""
    match = _LABEL.fullmatch(str(label))
    return int(match[1]) if match else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStats:
    """The server's totals of one request: steps by number of accepted draft tokens, the lookahead at startup, versions
    by token."""

    steps_by_accepted: tuple[int, ...]
    lookahead: int
    spans: tuple[tuple[int, int, int], ...]
    """(version, first token, token after the last)."""

    @property
    def num_steps(self) -> int:
        return sum(self.steps_by_accepted)

    @classmethod
    def of(cls, meta: Mapping[str, Any], lookahead: int) -> "ServerStats":
        """Read the meta_info of a finished request; missing fields count as none."""
        histogram = tuple(int(num) for num in meta.get("spec_correct_drafts_histogram") or ())
        spans = meta.get("weight_versions") or ()
        return cls(
            steps_by_accepted=histogram,
            lookahead=lookahead,
            spans=tuple((version_of(span["version"]), int(span["start"]), int(span["end"])) for span in spans),
        )


def uncaptured(
    stats: ServerStats, steps: Sequence[VerifyStep], num_output: int, decode_s: float
) -> UncapturedSteps | None:
    """Totals of the steps that were not captured; None if all were.

    Their version is the one that gave most of the tokens that no captured step covers, which is exact unless a swap
    fell between them. `decode_s` is the duration of the whole output.
    """
    remaining = Counter({accepted: num for accepted, num in enumerate(stats.steps_by_accepted) if num})
    remaining.subtract(Counter(step.accepted for step in steps))
    remaining = +remaining
    if not remaining:
        return None
    missing = _missing(steps, num_output)
    deepest = max(remaining)
    return UncapturedSteps(
        draft_version=_version(stats.spans, missing),
        verify_steps=remaining.total(),
        proposed=(remaining.total(),) * max(stats.lookahead, deepest),
        accepted=tuple(sum(num for n, num in remaining.items() if n > position) for position in range(deepest)),
        tokens=len(missing),
        duration_s=decode_s * len(missing) / max(1, num_output - 1),
    )


def _missing(steps: Sequence[VerifyStep], num_output: int) -> set[int]:
    """Output tokens that no captured step covers; the first token comes from the prefill."""
    missing = set(range(1, num_output))
    for step in steps:
        missing.difference_update(range(step.start, step.start + step.emitted))
    return missing


def _version(spans: Sequence[tuple[int, int, int]], missing: set[int]) -> int:
    tokens_by_version: Counter[int] = Counter()
    for version, start, end in spans:
        tokens_by_version[version] += sum(start <= token < end for token in missing)
    return max(tokens_by_version, key=lambda version: tokens_by_version[version], default=0)
