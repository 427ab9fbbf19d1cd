"""The console beside a stack never holds it up, and says when it has ended."""

from pathlib import Path

from tests.support.wait import wait_until

from updraft_cli.local.console import console


def test_a_console_that_cannot_start_is_one_sentence_and_its_reason_is_in_the_log(tmp_path: Path) -> None:
    addresses, failures = list[str](), list[str]()
    with console(tmp_path, "127.0.0.1:1", addresses.append, failures.append):
        wait_until(lambda: bool(failures), what="the sentence")
    log = tmp_path / "logs" / "console.log"
    assert failures == [f"The console has ended, and everything else goes on. The reason is in {log}."]
    assert "no registry answers at 127.0.0.1:1" in log.read_text()
    assert addresses == []


def test_a_console_that_is_ended_with_its_stack_is_silent(tmp_path: Path) -> None:
    failures = list[str]()
    with console(tmp_path, "127.0.0.1:1", failures.append, failures.append):
        pass
    assert failures == []
