"""What the pictures of the console show: ninety made-up minutes of one fleet, with a shift of its traffic, always the same.

A console knows the past only from what it saw, so its backend goes through the whole story before a picture is taken.
"""

import math
import random
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from tests.support.console import NOW, Memory, MemoryBackend, state

from updraft_cli.backends.drafts import Acceptance, Draft, HistoryEntry
from updraft_cli.backends.snapshot import PodState, Snapshot, SpeculatorSnapshot
from updraft_cli.backends.speculators import DomainChange, MetricChange, ServedVersion, Speculator, Speedup, Trial

PODS, VERSIONS = 48, 14
END = NOW + timedelta(minutes=7)
"""The newest version has been in canary for five minutes."""

_MINUTES = 84
_SHIFT = 40
"""Minutes before the end."""
_STEP_S = 10
_STEPS = 21_600
"""Of the optimizer at the end: the newest version was trained for 21,000."""

_REASONS = {
    "stable": "better on live traffic: acceptance length +4.1 % (+1.2 to +7.0 %)",
    "canary": "better on held-out requests: +3.8 % (+1.1 to +6.6 %)",
    "superseded": "a newer version won",
    "rejected": "not surely better on held-out requests: +0.4 % (-1.6 to +2.4 %)",
}


@dataclass(frozen=True, slots=True)
class StoryBackend(MemoryBackend):
    def snapshots(self) -> Generator[Snapshot]:
        for snapshot in story():
            self.memory.snapshot = snapshot
            yield snapshot
        while True:
            yield self.memory.snapshot


def backend() -> StoryBackend:
    return StoryBackend(Memory(last()), place="registry 127.0.0.1:50051")


def last() -> Snapshot:
    """The state at the end."""
    *_, snapshot = story()
    return snapshot


def story() -> Iterator[Snapshot]:
    """The states, from the first to the last."""
    noise, totals = random.Random(4), dict[int, Acceptance]()
    base = state(num_pods=PODS, num_versions=VERSIONS)
    (one,) = base.speculators
    drafts = tuple(_draft(draft) for draft in one.drafts)
    one = replace(one, drafts=drafts, history=tuple(_history(drafts)), pods=tuple(map(_pod, one.pods)))
    for seconds in range(-60 * _MINUTES, 1, _STEP_S):
        time = END + timedelta(seconds=seconds)
        speculator = _speculator(one, time, noise, totals)
        installation = replace(base.installation, speculators=(speculator,))
        if (training := installation.training) is not None and (serving := installation.serving) is not None:
            length = _length(speculator.stable, time)
            training = replace(
                training,
                loss=1.05 + 0.5 * math.exp(-_learned(time) / 18) + noise.gauss(0, 0.02),
                acceptance_length={"candidate": length + 0.12 + noise.gauss(0, 0.01), "baseline": length},
                trained_length=length + 0.35,
                demand_tokens_per_s=900.0 + 60 * noise.random(),
            )
            if (learning := speculator.learning) is not None:
                learning = replace(learning, loss=training.loss, steps=_STEPS)
                speculator = replace(speculator, learning=learning)
                installation = replace(installation, speculators=(speculator,))
            serving = replace(serving, lookahead=round(1.2 * length), draft_version=speculator.stable)
            installation = replace(installation, training=training, serving=serving)
        yield Snapshot(time=time, installation=installation, speculators=(replace(one, speculator=speculator),))


def _draft(draft: Draft) -> Draft:
    at = draft.published or NOW
    length = _length(draft.version or 1, at + timedelta(minutes=5))
    return replace(
        draft,
        reason=_REASONS[draft.phase],
        acceptance=Acceptance(length=length, verify_steps=41_200, tokens=round(41_200 * length)),
        digest=_digest(draft.version or 0),
    )


def _pod(pod: PodState) -> PodState:
    number = int(pod.name[-5:])
    states = {17: ("failed", "it refused version 12: no space left on the device"), 31: ("draining", "")}
    now, problem = states.get(number, (pod.state, ""))
    version = pod.version if now != "failed" else VERSIONS - 3
    digest = _digest(version or 0)
    return replace(
        pod,
        state=now,
        problem=problem,
        version=version,
        digest=digest,
        last_report=END - timedelta(seconds=number % 10),
    )


def _digest(version: int) -> str:
    return f"sha256:{random.Random(version).getrandbits(256):064x}"


def _history(drafts: tuple[Draft, ...]) -> Iterator[HistoryEntry]:
    """All changes, oldest first: a version is judged two minutes after it came, and wins after four in canary."""
    entries = [entry for draft in drafts for entry in _changes(draft)]
    stable = 0
    for entry in sorted(entries, key=lambda entry: entry.time):
        yield entry
        if entry.phase == "stable":
            if stable:
                reason = f"version {entry.version} won"
                yield replace(entry, version=stable, before="stable", phase="superseded", reason=reason)
            stable = entry.version


def _changes(draft: Draft) -> Iterator[HistoryEntry]:
    published, number = draft.published or NOW, draft.version or 0
    first = HistoryEntry(
        time=published, version=number, before="", phase="pending", reason="published by the trainer", actor="publish"
    )
    judged = replace(first, time=published + timedelta(minutes=2), before="pending", actor="gate")
    yield first
    if draft.phase == "rejected":
        yield replace(judged, phase="rejected", reason=_REASONS["rejected"])
        return
    yield replace(judged, phase="canary", reason=_REASONS["canary"])
    if draft.phase != "canary":
        won = published + timedelta(minutes=6)
        yield replace(judged, time=won, before="canary", phase="stable", reason=_REASONS["stable"])


def _speculator(
    one: SpeculatorSnapshot, time: datetime, noise: random.Random, totals: dict[int, Acceptance]
) -> Speculator:
    """`totals` is what each version has served so far, and grows."""
    stable, candidate, since = _serving(one, time)
    length = _length(stable, time) + noise.gauss(0, 0.015)
    for version, phase_length, steps in ((stable, length, 9_000), (candidate, 1.041 * length, 900)):
        totals[version] = _more(totals.get(version), steps, phase_length)
    speed = 1 + 0.34 * (length - 1) + noise.gauss(0, 0.006)
    speculator = one.speculator
    age, trial = time - since, speculator.trial
    if trial is not None:
        trial = replace(trial, candidate=candidate, baseline=stable, started=since, step_since=since)
        trial = _trial(trial, time, age, noise) if candidate else None
    return replace(
        speculator,
        stable=stable,
        candidate=candidate,
        pods=replace(speculator.pods, serving_stable=PODS - 5, failed=1),
        acceptance=totals[stable],
        speedup=Speedup(ratio=speed, low=speed - 0.06, high=speed + 0.06),
        domains=tuple(
            replace(domain, stable=length + extra, candidate=length + extra + 0.1 if candidate else None)
            for domain, extra in zip(speculator.domains, (0.22, -0.31), strict=True)
        ),
        traffic=tuple(
            ServedVersion(version=version, phase=phase, acceptance=totals[version])
            for version, phase in ((candidate, "canary"), (stable, "stable"))
            if version
        ),
        pace=speculator.pace
        and replace(speculator.pace, last_save=time - timedelta(minutes=1), estimate_due=time + timedelta(minutes=2)),
        trial=trial,
        message=f"version {candidate} is in canary on 4 pods" if candidate else f"version {stable} is stable",
        trainer_message=f"version {max(stable, candidate)} was published {int(age.total_seconds()) // 60 + 2} min ago",
    )


def _more(total: Acceptance | None, steps: int, length: float) -> Acceptance:
    """Ten more seconds of traffic."""
    tokens = round(steps * length) + ((total and total.tokens) or 0)
    steps += (total and total.verify_steps) or 0
    shares = tuple((tokens / steps - 1) * share for share in (0.5, 0.31, 0.19))
    return Acceptance(
        length=tokens / steps,
        verify_steps=steps,
        tokens=tokens,
        by_position=shares,
        by_lookahead=(0.03, 0.09, 0.2, 0.68),
    )


def _serving(one: SpeculatorSnapshot, time: datetime) -> tuple[int, int, datetime]:
    """The stable version and the one in canary (0: none) at a time, and since when: each wins after four minutes."""
    stable, candidate, since = 1, 0, time - timedelta(minutes=1)
    for draft in reversed(one.drafts):
        begun = (draft.published or NOW) + timedelta(minutes=2)
        if draft.phase == "rejected" or begun > time or draft.version is None:
            continue
        if draft.phase != "canary" and time - begun > timedelta(minutes=4):
            stable, candidate = draft.version, 0
        else:
            candidate, since = draft.version, begun
    return stable, candidate, since


def _trial(trial: Trial, time: datetime, age: timedelta, noise: random.Random) -> Trial:
    """Evidence that closes in on a gain of 4 %."""
    width = 16 / math.sqrt(1 + age.total_seconds() / 18)
    gain, slower = 4.1 + noise.gauss(0, width / 14), -1.0 + noise.gauss(0, width / 20)
    slices = int(age.total_seconds() // 6)
    return replace(
        trial,
        requests=8 * slices,
        slices=slices,
        acceptance_length=_change(_length(trial.baseline, time), gain, width),
        inter_token_latency_s=_change(0.0214, slower, 0.8 * width),
        domains=tuple(
            DomainChange(
                domain=name,
                acceptance_length=_change(factor * _length(trial.baseline, time), gain + more, 1.6 * width),
            )
            for name, factor, more in (("code", 1.09, -0.5), ("math", 0.88, 0.4))
        ),
        evidence=f"acceptance length {gain:+.1f} % ({gain - width:+.1f} to {gain + width:+.1f} %), {slices} slices",
    )


def _change(stable: float, percent: float, width: float) -> MetricChange:
    return MetricChange(
        candidate=stable * (1 + percent / 100),
        stable=stable,
        change_percent=percent,
        low_percent=percent - width,
        high_percent=percent + width,
    )


def _learned(time: datetime) -> float:
    """Minutes since the traffic became what it is."""
    minutes = _MINUTES - (END - time).total_seconds() / 60
    return minutes if minutes < _MINUTES - _SHIFT else minutes - (_MINUTES - _SHIFT)


def _length(version: int, time: datetime) -> float:
    """The acceptance length of a version: newer ones are better, but those from before the shift lose by it."""
    has_shifted = END - time < timedelta(minutes=_SHIFT)
    num_since = version - (7 if has_shifted else 0)
    return 1.5 + 1.25 * (1 - math.exp(-max(num_since, 0) / 3.2)) + (0.05 if has_shifted else 0)
