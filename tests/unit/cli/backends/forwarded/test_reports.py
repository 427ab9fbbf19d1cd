"""Registries are read beside each other; nothing that one of them answers or does harms the others or the console."""

import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import cast

import pytest
from tests.support.console import NOW, state
from tests.support.wait import LONG_S, wait_until

from updraft_chassis.credentials import Credentials
from updraft_chassis.errors import Unavailable
from updraft_cli.backends.forwarded import reports as module
from updraft_cli.backends.forwarded.reports import Reports
from updraft_cli.backends.forwarded.tunnels import Tunnels
from updraft_cli.backends.installation import Installation
from updraft_cli.backends.registry import RegistryBackend
from updraft_cli.backends.snapshot import Snapshot, SpeculatorSnapshot

Answers = dict[str, Callable[[], SpeculatorSnapshot]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scripted(RegistryBackend):
    """Answers with what a function returns, or raises what it raises."""

    answer: Callable[[], SpeculatorSnapshot]

    def snapshots(self) -> Generator[Snapshot]:
        while True:
            yield Snapshot(time=NOW, installation=Installation(speculators=()), speculators=(self.answer(),))


@dataclass
class Way:
    """An open way to a registry."""

    answer: Callable[[], SpeculatorSnapshot]
    problem: str = ""

    def registry(self) -> RegistryBackend:
        return Scripted(address="127.0.0.1:1", credentials=Credentials(), local=_nothing, answer=self.answer)

    def failed(self, error: Exception) -> None:
        self.problem = str(error)


def _nothing() -> Installation:
    return Installation(speculators=())


def _named(name: str) -> SpeculatorSnapshot:
    one = state().speculators[0]
    return replace(one, speculator=replace(one.speculator, name=name))


@pytest.fixture
def answers() -> Answers:
    """How the registry of each speculator answers."""
    return {}


@pytest.fixture
def reports(answers: Answers) -> Iterator[Reports]:
    ways = SimpleNamespace(to=lambda _namespace, name: Way(answers[name]))
    one = Reports(cast("Tunnels", ways))
    yield one
    one.close()


def test_an_answer_that_cannot_be_read_is_said_and_the_next_look_asks_again(
    reports: Reports, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PAUSE", 0.0)
    monkeypatch.setattr(module, "_PATIENCE_S", LONG_S)  # so that every look has all answers, also on a slow machine
    once = iter([KeyError("odd")])

    def odd_once() -> SpeculatorSnapshot:
        for error in once:
            raise error
        return _named("odd")

    answers |= {"odd": odd_once, "well": lambda: _named("well")}
    both = [_named("odd"), _named("well")]
    problems = list[str]()

    def are_shown() -> bool:
        odd, well = reports.read(both)
        problems.append(odd.problem)
        return odd.snapshot is not None and well.snapshot is not None

    wait_until(are_shown, what="both reports")
    assert set(problems) == {"its answer cannot be read (KeyError: 'odd')", ""}


def test_a_slow_registry_is_not_kept_busy(reports: Reports, answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAUSE", 1e6)
    num_reads = 0

    def slow() -> SpeculatorSnapshot:
        nonlocal num_reads
        num_reads += 1
        time.sleep(0.01)
        return _named("slow")

    answers["slow"] = slow
    wait_until(lambda: reports.read([_named("slow")])[0].snapshot is not None, what="its report")
    for _ in range(5):
        assert reports.read([_named("slow")])[0].snapshot is not None
    assert num_reads == 1


def test_a_question_for_which_no_thread_was_free_in_time_is_never_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", 1)
    monkeypatch.setattr(module, "_DETAILS_S", 0.05)
    reports, asked, go_on = Reports(cast("Tunnels", None)), list[str](), threading.Event()
    try:
        with pytest.raises(Unavailable, match=r"does not answer within 0\.05 s"):
            reports.details("hangs", go_on.wait)
        with pytest.raises(Unavailable, match=r"does not answer within 0\.05 s"):
            reports.details("well", lambda: asked.append("too late"))
        go_on.set()
        monkeypatch.setattr(module, "_DETAILS_S", 60.0)
        reports.details("well", lambda: asked.append("in time"))
    finally:
        reports.close()
    assert asked == ["in time"]
