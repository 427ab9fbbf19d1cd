"""A rollout while it changes, without a registry."""

import io
import signal
import sys
import threading
from collections.abc import Generator
from datetime import datetime
from types import SimpleNamespace

import pytest
from rich.console import Console
from tests.support.registry_answers import NOW, canary, rollout, state, version
from tests.support.wait import LONG_S

from updraft.registry.v1 import registry_pb2 as pb
from updraft_cli.backends import wire
from updraft_cli.backends.installation import Installation
from updraft_cli.backends.speculators import RolloutStatus
from updraft_cli.cmd import follow as watch
from updraft_cli.cmd.follow import INTERRUPTED, Lines, Screen, View, follow
from updraft_cli.cmd.rollout import view
from updraft_cli.cmd.status import view as status_view

VIEW = View(items=view.items, rendered=view.rendered)


def tried(**fields: object) -> RolloutStatus:
    return RolloutStatus.of(wire.speculator(canary(**fields)), wire.draft(version(3, pb.PHASE_CANARY)))


def over() -> RolloutStatus:
    return RolloutStatus.of(wire.speculator(state(latest=3)), wire.draft(version(3, pb.PHASE_ROLLED_BACK)))


def now() -> datetime:
    return NOW


@pytest.fixture
def out() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def lines(out: io.StringIO) -> Lines[RolloutStatus]:
    return Lines(Console(file=out, width=1000, highlight=False), now, VIEW)


def test_a_line_is_written_for_a_change_and_not_for_a_second_that_passed(
    lines: Lines[RolloutStatus], out: io.StringIO
) -> None:
    lines.show(tried(message="step 2 in 48 s"))
    lines.show(tried(message="step 2 in 47 s"))
    lines.show(tried(message="step 2 in 40 s", rollout=rollout(slices=13)))
    lines.show(over())
    lines.show(over())
    assert out.getvalue().splitlines() == [
        "2026-11-24 12:00:00 step 2 in 48 s",
        "2026-11-24 12:00:00 step 2 in 40 s",
        "2026-11-24 12:00:00 version 2 is stable",
    ]


def test_pods_that_take_turns_are_no_news(lines: Lines[RolloutStatus], out: io.StringIO) -> None:
    turns = rollout(comparison=pb.COMPARISON_SWITCHBACK)
    lines.show(tried(rollout=turns, pods=pb.Pods(connected=1, serving_candidate=1)))
    lines.show(tried(rollout=turns, pods=pb.Pods(connected=1, serving_stable=1)))
    assert len(out.getvalue().splitlines()) == 1


def test_an_outage_is_reported_once_on_stderr_and_its_end_by_the_state(
    lines: Lines[RolloutStatus], out: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    lines.show(over())
    lines.lost("the registry is away")
    lines.lost("the registry is away")
    lines.show(over())
    assert capsys.readouterr().err == "2026-11-24 12:00:00 the registry is away; trying again\n"
    assert out.getvalue().splitlines() == ["2026-11-24 12:00:00 version 2 is stable"] * 2


def test_a_status_watch_reports_a_registry_that_does_not_answer_as_an_outage(
    out: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    status = View(items=status_view.items, rendered=status_view.rendered)
    lines = Lines(Console(file=out, width=1000, highlight=False), now, status)
    for speculators in ((wire.speculator(state()),), None, None, (wire.speculator(state()),)):
        lines.show(Installation(speculators=speculators))
    assert capsys.readouterr().err == "2026-11-24 12:00:00 the registry does not answer; trying again\n"
    before, after = out.getvalue().splitlines()
    assert before == after


def test_a_terminal_keeps_the_last_picture_and_shows_that_the_registry_is_away(out: io.StringIO) -> None:
    console = Console(file=out, width=80, force_terminal=True, color_system=None, highlight=False)
    with Screen(console, now, VIEW, is_wide=False) as screen:
        screen.show(over())
        screen.lost("the registry is away")
    last = out.getvalue().rpartition("\x1b[2K")[2]
    assert "Version 2 is stable." in last
    assert "The registry is away. Trying again." in last


def test_a_line_of_a_status_is_not_written_for_what_the_trainer_estimated_meanwhile(out: io.StringIO) -> None:
    view_of_all = View(items=status_view.items, rendered=lambda *_, **__: "")
    lines: Lines[Installation] = Lines(Console(file=out, width=1000, highlight=False), now, view_of_all)
    for why in ("not sure yet", "surely worse"):
        lines.show(Installation(speculators=(wire.speculator(state(trainer_message=why)),)))
    assert len(out.getvalue().splitlines()) == 1


class InterruptedAtItsEnd:
    """Ctrl-C comes while it is finalized."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_during_a_finalizer_ends_a_watch_too(capsys: pytest.CaptureFixture[str]) -> None:
    ended = threading.Event()

    def states() -> Generator[RolloutStatus]:
        try:
            yield tried(message="step 2")
            InterruptedAtItsEnd()
            threading.Event().wait(LONG_S)
        finally:
            ended.set()

    with pytest.raises(SystemExit) as exit_:
        follow(states(), VIEW, "table", is_last=lambda _: False)
    assert exit_.value.code == INTERRUPTED
    assert ended.is_set()
    assert capsys.readouterr().err == ""


def test_an_interrupt_that_is_not_repeated_in_the_block_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_AGAIN_S", 600.0)
    before = set(threading.enumerate())

    with watch.interrupts_again():
        sys.unraisablehook(SimpleNamespace(exc_type=KeyboardInterrupt))
        (timer,) = set(threading.enumerate()) - before

    timer.join(timeout=30)
    assert not timer.is_alive()
