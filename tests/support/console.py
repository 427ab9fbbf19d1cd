"""A console's backend that answers from memory, states of any size for it, and a browser without scripts."""

import re
import threading
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from html import unescape
from html.parser import HTMLParser
from typing import Any, Self

import httpx
from tests.support.wait import LONG_S

from updraft_chassis.errors import NotFound
from updraft_cli.backends.drafts import (
    Acceptance,
    DomainAcceptance,
    Draft,
    DraftDetails,
    HistoryEntry,
    OfflineEvaluation,
    Provenance,
    Tensor,
)
from updraft_cli.backends.installation import Installation, Serving, Training
from updraft_cli.backends.policy import Policy
from updraft_cli.backends.protocol import Decision, Verb, Version
from updraft_cli.backends.snapshot import PodDetails, PodState, Snapshot, SpeculatorSnapshot
from updraft_cli.backends.speculators import (
    DomainChange,
    Learning,
    MetricChange,
    Pace,
    Pods,
    ServedVersion,
    Speculator,
    Speedup,
    TrafficKind,
    TrafficShift,
    Trial,
)
from updraft_cli.local.process import ProcessState

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)


@dataclass(slots=True)
class Memory:
    """What is shared by the backends of one console."""

    snapshot: Snapshot
    decisions: list[tuple[str, Verb, Version | None, str]] = field(default_factory=list)
    """(speculator, verb, version, reason) of those that were carried out."""
    refusal: str = ""
    problem: Exception | None = None
    """Raised instead of an answer."""
    hold: threading.Event | None = None
    """No read ends before this is set."""
    calls: list[str] = field(default_factory=list)
    """Calls about one version or one pod."""


@dataclass(frozen=True, slots=True)
class MemoryBackend:
    """Reads `memory.snapshot`; a second of traffic passes with each read."""

    memory: Memory
    speculator: str = ""
    reason: str = ""
    has_reasons: bool = True
    place: str = "the memory of a test"

    def snapshots(self) -> Generator[Snapshot]:
        while True:
            if self.memory.hold is not None:
                self.memory.hold.wait()
            if self.memory.problem is not None:
                raise self.memory.problem
            self.memory.snapshot = later(self.memory.snapshot)
            yield self.memory.snapshot

    def draft(self, version: Version) -> DraftDetails:
        one = self._one()
        self.memory.calls.append(f"draft {version}")
        for draft in one.drafts:
            if draft.version == version:
                return details(draft, one)
        raise NotFound(f"{self.speculator} has no version {version}")

    def pod(self, name: str) -> PodDetails:
        one = self._one()
        self.memory.calls.append(f"pod {name}")
        for pod in one.pods:
            if pod.name == name:
                return PodDetails(pod=pod, traffic=one.speculator.traffic, speedup=one.speculator.speedup)
        raise NotFound(f"{self.speculator} has no pod {name}")

    def decide(self, verb: Verb, version: Version | None) -> Decision:
        if self.memory.problem is not None:
            raise self.memory.problem
        self.memory.decisions.append((self.speculator, verb, version, self.reason))
        number = version if isinstance(version, int) else None
        return Decision(name=self.speculator, verb=verb, version=number, changed=True, message=f"{verb} is done")

    def refusal(self) -> str:
        return self.memory.refusal

    def about(self, speculator: str, reason: str = "") -> Self:
        return replace(self, speculator=speculator, reason=reason)

    def _one(self) -> SpeculatorSnapshot:
        one = self.memory.snapshot.speculator(self.speculator)
        if one is None:
            raise NotFound(f"there is no speculator {self.speculator}")
        return one


def later(snapshot: Snapshot) -> Snapshot:
    """The same a second later: all versions with traffic have served 100 verify steps more."""
    speculators = tuple(
        replace(one, speculator=replace(one.speculator, traffic=tuple(map(_served, one.speculator.traffic))))
        for one in snapshot.speculators
    )
    return replace(snapshot, time=snapshot.time + timedelta(seconds=1), speculators=speculators)


def _served(version: ServedVersion) -> ServedVersion:
    acceptance = version.acceptance
    steps, tokens = (acceptance.verify_steps or 0) + 100, (acceptance.tokens or 0) + round(100 * acceptance.length)
    return replace(version, acceptance=replace(acceptance, verify_steps=steps, tokens=tokens))


def memory_backend(snapshot: Snapshot | None = None) -> MemoryBackend:
    return MemoryBackend(Memory(snapshot or state()))


def state(*, num_pods: int = 4, num_versions: int = 6, **changes: Any) -> Snapshot:
    """A speculator whose newest version is in canary; `changes` replace fields of its Speculator."""
    stable, candidate = max(1, num_versions - 2), num_versions
    one = SpeculatorSnapshot(
        speculator=replace(speculator(stable=stable, candidate=candidate, num_pods=num_pods), **changes),
        drafts=tuple(draft(number, stable, candidate) for number in range(num_versions, 0, -1)),
        history=tuple(entry for number in range(1, num_versions + 1) for entry in history(number, stable, candidate)),
        pods=tuple(pod(number, num_pods, stable, candidate) for number in range(num_pods)),
    )
    installation = Installation(
        processes=(ProcessState(name="registry", state="ready", pid=1, restarts=0, address="127.0.0.1:50051", log=""),),
        speculators=(one.speculator,),
        serving=serving(stable),
        training=training(),
    )
    return Snapshot(time=NOW, installation=installation, speculators=(one,))


def speculator(*, stable: int, candidate: int, num_pods: int) -> Speculator:
    num_candidate = max(1, num_pods // 10)
    by_position, by_lookahead = (0.82, 0.64, 0.47), (0.04, 0.08, 0.18, 0.7)
    served = [
        ServedVersion(
            version=version,
            phase=phase,
            acceptance=Acceptance(
                length=length, verify_steps=120_000, tokens=310_000, by_position=by_position, by_lookahead=by_lookahead
            ),
        )
        for version, phase, length in ((candidate, "canary", 2.75), (stable, "stable", 2.59))
    ]
    return Speculator(
        name="qwen",
        message=f"version {candidate} is in canary on {num_candidate} pods: 312 requests, 41 slices",
        stable=stable,
        candidate=candidate,
        previous=max(0, stable - 1),
        latest=candidate,
        pinned=None,
        paused=False,
        pods=Pods(
            connected=num_pods, serving_stable=num_pods - num_candidate, serving_candidate=num_candidate, failed=0
        ),
        acceptance=served[1].acceptance,
        domains=(
            DomainAcceptance(domain="code", stable=2.9, candidate=3.1),
            DomainAcceptance(domain="math", stable=2.2, candidate=2.3),
        ),
        speedup=Speedup(ratio=1.62, low=1.55, high=1.69),
        trial=Trial(
            candidate=candidate,
            baseline=stable,
            comparison="pods",
            step=1,
            steps=2,
            pods_percent=10,
            started=NOW - timedelta(minutes=4),
            step_since=NOW - timedelta(minutes=1),
            verdict="hold",
            acceptance_length=MetricChange(
                candidate=2.75, stable=2.59, change_percent=6.2, low_percent=-0.4, high_percent=13.1
            ),
            inter_token_latency_s=MetricChange(
                candidate=0.021, stable=0.022, change_percent=-4.5, low_percent=-9.0, high_percent=0.5
            ),
            requests=312,
            slices=41,
            failures=0,
            evidence="acceptance length +6.2 % (-0.4 to +13.1 %)",
            domains=(
                DomainChange(
                    domain="math",
                    acceptance_length=MetricChange(
                        candidate=2.3, stable=2.2, change_percent=4.5, low_percent=-4.1, high_percent=13.6
                    ),
                ),
                DomainChange(domain="code", acceptance_length=None),
            ),
        ),
        policy=Policy.model_validate(
            {
                "strategy": "canary",
                "steps": [{"pods_percent": 10, "hold_seconds": 120}, {"pods_percent": 50, "hold_seconds": 120}],
                "analysis": {
                    "min_samples": 200,
                    "failure_limit": 0,
                    "max_acceptance_regression_percent": 5,
                    "max_latency_regression_percent": 10,
                    "max_domain_regression_percent": 10,
                    "confidence": 0.95,
                    "on_inconclusive": "rollback",
                },
                "progress_deadline_seconds": 1800,
            }
        ),
        traffic=tuple(served),
        trainer_message="version 6 was published 4 min ago",
        learning=learning(),
        pace=Pace(
            device="cpu (2 threads)",
            ranks=1,
            tokens_per_second=5_400.0,
            utilization=None,
            shares={"forward": 0.41, "backward": 0.37, "optimizer": 0.1, "data": 0.07, "waiting": 0.05},
            steps_to_estimate=120,
            estimate_due=NOW + timedelta(minutes=2),
            last_save=NOW - timedelta(minutes=1),
        ),
    )


def learning() -> Learning:
    """A trainer whose traffic shifted from chat to code and mathematics."""
    return Learning(
        samples=4_210,
        held_out=310,
        steps=9_120,
        estimates=14,
        loss=1.234,
        held_out_length=MetricChange(candidate=2.7, stable=2.6, change_percent=3.8, low_percent=1.1, high_percent=6.6),
        trained_length=3.4,
        lag_s=0.4,
        demand_tokens_per_s=900.0,
        granted_tokens_per_s=800.0,
        kinds=(
            kind("code", 0.6, samples=2_000, held_out=150, last_hour=700, candidate=2.9, stable=2.8),
            kind("chat", 0.0, samples=1_210, held_out=90, last_hour=0, candidate=2.1, stable=2.2),
            kind("math", 0.4, samples=1_000, held_out=70, last_hour=420, candidate=2.3, stable=2.2),
        ),
        shifts=(TrafficShift(time=NOW - timedelta(minutes=33), before="chat", after="code"),),
    )


def kind(
    name: str, share: float, *, samples: int, held_out: int, last_hour: int, candidate: float, stable: float
) -> TrafficKind:
    return TrafficKind(
        name=name,
        samples=samples,
        held_out=held_out,
        last_hour=last_hour,
        last_day=samples,
        recent_share=share,
        candidate_length=candidate,
        stable_length=stable,
    )


def draft(number: int, stable: int, candidate: int) -> Draft:
    return Draft(
        speculator="qwen",
        version=number,
        phase=phase_of(number, stable, candidate),
        since=NOW - timedelta(minutes=5 * (candidate - number)),
        reason="it won" if number <= stable else "it passed the offline gate",
        source="trainer",
        parent=number - 1 if number % 5 else max(0, number - 3),
        samples=700 * number,
        step=1_500 * number,
        size_bytes=48_000_000,
        digest=f"sha256:{number:064x}",
        published=NOW - timedelta(minutes=6 * (candidate - number)),
        pinned=False,
        retained=False,
        acceptance=Acceptance(length=2.0 + 0.1 * min(number, 8), verify_steps=1_000, tokens=2_500),
    )


def phase_of(number: int, stable: int, candidate: int) -> str:
    if number in (stable, candidate):
        return "stable" if number == stable else "canary"
    return "rejected" if number % 5 == 4 or number > stable else "superseded"


def history(number: int, stable: int, candidate: int) -> tuple[HistoryEntry, ...]:
    at = NOW - timedelta(minutes=6 * (candidate - number))
    phases = ("pending", phase_of(number, stable, candidate))
    return tuple(
        HistoryEntry(
            time=at + timedelta(minutes=2 * index),
            version=number,
            before=phases[index - 1] if index else "",
            phase=phase,
            reason="published (trainer)" if not index else "the offline gate decided",
            actor="gate",
        )
        for index, phase in enumerate(phases)
    )


def pod(number: int, num_pods: int, stable: int, candidate: int) -> PodState:
    version = candidate if number < max(1, num_pods // 10) else stable
    return PodState(
        name=f"qwen-serving-7d4b9c-{number:05}",
        state="connected",
        version=version,
        digest=f"sha256:{version:064x}",
        prefetched=(version,),
        engine="torch/0.1.0",
        device="cpu",
        last_report=NOW - timedelta(seconds=number % 10),
        running_requests=number % 8,
        swaps=3,
        refused_swaps=0,
        swap_pause_s=0.012,
    )


def serving(stable: int) -> Serving:
    return Serving(
        kernels="avx512",
        draft_version=stable,
        swaps=3,
        running_requests=2,
        queued_requests=0,
        output_tokens=120_000,
        acceptance_length={"eagle3": 2.6},
        expected_survival={"eagle3": {"1": 0.8, "2": 0.6, "3": 0.4}},
        verify_ms={"1": 11.0, "2": 11.5, "4": 12.5},
        captured=900,
        capture_dropped={"queue_full": 3},
        lookahead=3.0,
        granted_tokens_per_s=800.0,
    )


def training() -> Training:
    return Training(
        optimizer_steps=9_120,
        trained_tokens=5_000_000,
        samples={"train": 4_210, "evaluation": 310},
        loss=1.234,
        acceptance_length={"candidate": 2.7, "baseline": 2.6},
        published={"stable": 4, "rejected": 1},
        gain={"mean": 0.04, "low": 0.01, "high": 0.07},
        trained_length=3.4,
        replay={"window": 2_000, "reservoir": 2_210},
        lag_s=0.4,
        demand_tokens_per_s=900.0,
    )


def details(draft_: Draft, one: SpeculatorSnapshot) -> DraftDetails:
    return DraftDetails(
        draft=draft_,
        speculator=one.name,
        target_fingerprint="sha256:" + "a" * 64,
        tokenizer_fingerprint="sha256:" + "b" * 64,
        draft_vocabulary_fingerprint="sha256:" + "c" * 64,
        tensors_digest=draft_.digest,
        provenance=Provenance(
            first_trace="trace-1", last_trace="trace-9", config_digest="sha256:" + "d" * 64, code_version="0.1.0"
        ),
        config='{"hidden_size": 576}',
        evaluation=OfflineEvaluation(
            requests=300, lookahead=3, baseline_version=1, baseline_length=2.5, candidate_length=2.7
        ),
        tensors=(Tensor(name="fc.weight", dtype="BF16", shape=(576, 1728), digest=draft_.digest),),
        history=tuple(entry for entry in one.history if entry.version == draft_.version),
    )


class Browser:
    """A client of a console as a person's browser: with its cookie, and with the Origin and the hidden field of its forms."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.origin = address.partition("/?")[0]
        self.http = httpx.Client(base_url=self.origin, trust_env=False, timeout=LONG_S)

    def __enter__(self) -> Self:
        self.http.get(self.address)
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def page(self, path: str) -> str:
        """The HTML of a page that is there."""
        answer = self.http.get(path)
        assert answer.status_code == 200, answer.text
        return answer.text

    def text(self, path: str) -> str:
        """The text that a person reads on it."""
        return text_of(self.page(path))

    def decide(self, confirmation: str, **fields: str) -> httpx.Response:
        """Open a confirmation and send its form, with these fields changed."""
        form = Form.of(self.page(confirmation))
        return self.http.post(form.action, data={**form.fields, **fields}, headers={"Origin": self.origin})

    def events(self, page: str, speculator: str = "", argument: str = "") -> Generator[tuple[str, str]]:
        """Names and data of a page's live events."""
        query = {"page": page, "speculator": speculator, "argument": argument}
        with self.http.stream("GET", "/events", params=query) as answer:
            name, data = "", list[str]()
            for line in answer.iter_lines():
                kind, _, value = line.partition(": ")
                if kind == "event":
                    name = value
                elif kind == "data":
                    data.append(value)
                elif not line and name:
                    yield name, "\n".join(data)
                    name, data = "", []


@dataclass
class Form(HTMLParser):
    """The fields of the form on a page."""

    action: str = ""
    fields: dict[str, str] = field(default_factory=dict)
    choices: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._select = ""

    @classmethod
    def of(cls, html: str) -> Self:
        form = cls()
        form.feed(html)
        return form

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "form":
            self.action = given["action"]
        elif tag == "input":
            self.fields[given["name"]] = given.get("value", "")
        elif tag == "select":
            self._select = given["name"]
        elif tag == "option":
            self.choices.append(given["value"])
            if "selected" in given or self._select not in self.fields:
                self.fields[self._select] = given["value"]


def text_of(html: str) -> str:
    """The text of a page's main part, with single spaces."""
    main = html.partition("<main")[2] or html
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", main.partition(">")[2])).split())
