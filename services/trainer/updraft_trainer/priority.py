"""Lowers the priority of the process, because serving may share its machine."""

import os

_POLICIES = {"normal": os.SCHED_OTHER, "batch": os.SCHED_BATCH, "idle": os.SCHED_IDLE}


def yield_to_others(*, niceness: int, scheduling: str) -> None:
    """Set nice value and scheduling policy. Neither needs privileges. Threads inherit both, so call it before any starts."""
    os.nice(niceness)
    os.sched_setscheduler(0, _POLICIES[scheduling], os.sched_param(0))
