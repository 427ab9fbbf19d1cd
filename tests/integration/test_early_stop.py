"""A process that is told to stop while it still imports what it needs, as when a rollout changes its mind."""

import signal
from pathlib import Path

import pytest
from tests.support.processes import Process
from tests.support.wait import wait_until

NEVER_ENDS = "import signal\nwhile True:\n    signal.pause()\n"


def handles(pid: int, signum: signal.Signals) -> bool:
    """Whether the process has a handler for it, as the kernel sees it."""
    status = Path(f"/proc/{pid}/status").read_text()
    (handled,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(handled, 16) >> (signum - 1) & 1)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("module", ["updraft_inference", "updraft_registry", "updraft_trainer"])
def test_a_signal_during_the_imports_ends_the_process_at_once_without_a_word(
    module: str, signum: signal.Signals, tmp_path: Path
) -> None:
    (tmp_path / "pydantic.py").write_text(NEVER_ENDS)  # which all of them import
    with Process(module, {"PYTHONPATH": str(tmp_path)}, tmp_path / "log") as process:
        wait_until(lambda: handles(process.pid, signal.SIGTERM), what="the handlers (this one is the last)")
        process.send(signum)
        assert process.wait() == 0
    assert process.log() == ""
