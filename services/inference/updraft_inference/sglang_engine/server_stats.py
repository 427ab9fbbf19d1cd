"""The server's own sums of a request, less what was seen of its steps: so totals are exact whatever was captured. Pure.

But for drafts that are proposed with --speculative-adaptive: the server says of no step how many it made, and counts as many as
it was started with.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from updraft_inference.engine import UncapturedSteps, VerifyStep

_LABEL = re.compile(r"v(\d+)")


def label(version: int) -> str:
    """What we call a version to the server, in its `weight_version`."""
    return f"v{version}"


def version_of(said: object) -> int:
    """The version in a label; 0 for one that is not ours: the server's word for the weights that it started with."""
    found = _LABEL.fullmatch(str(said))
    return int(found[1]) if found else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStats:
    """Of one request: steps by how many drafts they accepted, drafts a step as the server was started, versions by token."""

    steps_by_accepted: tuple[int, ...]
    lookahead: int
    spans: tuple[tuple[int, int, int], ...]
    """(version, first token, token behind the last)."""

    @property
    def num_steps(self) -> int:
        """Verify steps."""
        return sum(self.steps_by_accepted)

    @classmethod
    def of(cls, meta: Mapping[str, Any], lookahead: int) -> "ServerStats":
        """Read a finished request's meta_info; what the server does not say is none."""
        histogram = tuple(int(num) for num in meta.get("spec_correct_drafts_histogram") or ())
        spans = meta.get("weight_versions") or ()
        return cls(
            steps_by_accepted=histogram,
            lookahead=lookahead,
            spans=tuple((version_of(span["version"]), int(span["start"]), int(span["end"])) for span in spans),
        )


def uncaptured(
    sums: ServerStats, steps: Sequence[VerifyStep], num_output: int, decode_s: float
) -> UncapturedSteps | None:
    """What the steps that did not come add up to; None if all came.

    Its version is the one that gave most of the tokens which no step accounts for: exact unless a swap fell between them.
    `decode_s` is what the whole output took.
    """
    left = Counter({accepted: num for accepted, num in enumerate(sums.steps_by_accepted) if num})
    left.subtract(Counter(step.accepted for step in steps))
    left = +left
    if not left:
        return None
    missing = _missing(steps, num_output)
    deepest = max(left)
    return UncapturedSteps(
        draft_version=_version(sums.spans, missing),
        verify_steps=left.total(),
        proposed=(left.total(),) * max(sums.lookahead, deepest),
        accepted=tuple(sum(num for n, num in left.items() if n > position) for position in range(deepest)),
        tokens=len(missing),
        duration_s=decode_s * len(missing) / max(1, num_output - 1),
    )


def _missing(steps: Sequence[VerifyStep], num_output: int) -> set[int]:
    """Output tokens that no step gave; the first one is of the prefill."""
    missing = set(range(1, num_output))
    for step in steps:
        missing.difference_update(range(step.start, step.start + step.emitted))
    return missing


def _version(spans: Sequence[tuple[int, int, int]], missing: set[int]) -> int:
    found: Counter[int] = Counter()
    for version, start, end in spans:
        found[version] += sum(start <= token < end for token in missing)
    return max(found, key=lambda version: found[version], default=0)
