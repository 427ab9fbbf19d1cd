"""Stacks that run are found wherever their data is."""

from pathlib import Path

import pytest
from tests.support.stacks import start

from updraft_chassis.errors import Conflict
from updraft_cli.local.folders import data_folder
from updraft_cli.local.running import find_stack, noted


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"XDG_DATA_HOME": str(tmp_path / "share"), "XDG_STATE_HOME": str(tmp_path / "state")}


def found(data: Path | None, environ: dict[str, str]) -> str | None:
    stack = find_stack(data, environ)
    return stack.model if stack else None


def test_a_stack_on_another_data_folder_is_found_while_it_runs(tmp_path: Path, environ: dict[str, str]) -> None:
    other = start(tmp_path / "other")
    assert found(None, environ) is None
    with noted(other, environ):
        assert found(None, environ) == "other"
    assert found(None, environ) is None


def test_the_default_data_folder_and_a_named_one_come_first(tmp_path: Path, environ: dict[str, str]) -> None:
    with noted(start(tmp_path / "other"), environ):
        start(data_folder(environ))
        assert found(None, environ) == "updraft"
        assert found(tmp_path / "nothing", environ) is None


def test_a_change_is_refused_while_several_stacks_run(tmp_path: Path, environ: dict[str, str]) -> None:
    with noted(start(tmp_path / "other"), environ):
        assert find_stack(None, environ, is_only=True) == find_stack(tmp_path / "other", environ)
        default = start(data_folder(environ))
        with pytest.raises(Conflict) as refused:
            find_stack(None, environ, is_only=True)
        assert str(refused.value) == (
            f"2 stacks run on this machine; choose one with --data or --registry: {default}, {tmp_path / 'other'}"
        )
        assert find_stack(default, environ, is_only=True) is not None


def test_a_note_that_a_kill_left_behind_is_no_stack(tmp_path: Path, environ: dict[str, str]) -> None:
    (tmp_path / "state/updraft/running").mkdir(parents=True)
    (tmp_path / "state/updraft/running/1").write_text(str(tmp_path / "gone"))
    assert found(None, environ) is None


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"/tmp/\0", b"relative"], ids=["empty", "no text", "NUL", "relative"]
)
def test_a_damaged_note_hides_no_other_stack(tmp_path: Path, environ: dict[str, str], content: bytes) -> None:
    with noted(start(tmp_path / "other"), environ):
        (tmp_path / "state/updraft/running/1").write_bytes(content)
        assert found(None, environ) == "other"
