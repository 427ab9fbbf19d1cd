"""The forms in which commands answer, whatever they answer."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime

import pytest
import yaml
from rich.text import Text
from tests.support.registry_answers import screen

from updraft_cli import output
from updraft_cli.output import Format


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    number: int
    at: datetime
    text: str


ANSWER = Answer(number=1, at=datetime(2026, 11, 24, tzinfo=UTC), text="größer")


def show(form: Format) -> None:
    output.show(ANSWER, form, names=[ANSWER.number, 2], rendered=lambda is_wide: f"wide: {is_wide}")


@pytest.mark.parametrize(("form", "is_wide"), [("table", False), ("wide", True)])
def test_a_person_sees_a_picture(capsys: pytest.CaptureFixture[str], form: Format, is_wide: bool) -> None:  # noqa: FBT001 - a case
    show(form)
    assert capsys.readouterr().out == f"wide: {is_wide}\n"


def test_a_program_reads_the_same_values_as_json_or_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    expected = {"number": 1, "at": "2026-11-24T00:00:00+00:00", "text": "größer"}
    show("json")
    assert json.loads(capsys.readouterr().out) == expected
    show("yaml")
    assert yaml.safe_load(capsys.readouterr().out) == expected


def test_names_come_one_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    show("name")
    assert capsys.readouterr().out == "1\n2\n"


def test_into_a_pipe_go_neither_colours_nor_folds_nor_padding(capsys: pytest.CaptureFixture[str]) -> None:
    table = output.table("phase", "reason")
    table.add_row(Text("stable", "bold green"), "a reason " * 40)
    table.add_row(Text("failed", "red"), "short")
    output.show(ANSWER, "table", names=(), rendered=lambda is_wide: table)
    header, first, second = capsys.readouterr().out.splitlines()
    assert (header, second) == ("phase   reason", "failed  short")
    assert first == f"stable  {'a reason ' * 40}".rstrip()


def test_on_a_narrow_terminal_only_the_last_column_gives_way() -> None:
    table = output.table(">version", "phase", "reason")
    table.add_row("12", "rolled back", output.cut("acceptance is significantly lower by more than 2 %"))
    table.add_row("11", "stable", "acceptance is significantly higher")
    assert screen(table, 42).splitlines() == [
        "version  phase        reason",
        "     12  rolled back  acceptance is signi…",
        "     11  stable       acceptance is",
        "                      significantly higher",
    ]


def test_what_is_waited_for_may_have_brackets_in_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    with output.waiting("Fetching [/tmp/a]"):
        pass
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (59.6, "1 min"), (65, "1 min 5 s"), (3600, "1 h"), (3605, "1 h"), (90_000, "1 d 1 h"), (-3, "0 s")],
)
def test_lengths_of_time_are_told_in_two_units(seconds: float, said: str) -> None:
    assert output.span(seconds) == said


def test_counts_agree_with_their_nouns() -> None:
    assert output.count(1, "pod") == "1 pod"
    assert output.count(1421, "request") == "1,421 requests"


def test_a_message_becomes_a_sentence() -> None:
    assert output.sentence("version 2 is stable") == "Version 2 is stable."
    assert output.sentence("") == ""
