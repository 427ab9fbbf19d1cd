"""`python tether.py PARENT COMMAND...`: become COMMAND, to be killed by the kernel when process PARENT ends.

A program of its own and not a preexec_fn: between fork and exec of a process with threads, Python code can
deadlock. It imports nothing of ours, so that it runs isolated (-I -S) and costs 15 ms.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h; the setting survives exec


def main() -> None:
    """Tie this process to its parent, then replace it with the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    libc = ctypes.CDLL(None, use_errno=True)
    # SIGKILL: the parent can no longer wait for a drain, and a restart must find the ports free.
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        raise SystemExit(f"the parent {parent} ended before {command[0]} started")
    try:
        os.execvp(command[0], command)  # noqa: S606 - the command is the supervisor's own
    except OSError as error:
        raise SystemExit(f"cannot run {command[0]}: {error.strerror}") from None


if __name__ == "__main__":
    main()
