"""Yield to whoever shares the machine: nice value and scheduling policy, before any thread exists to inherit them."""

import os

_POLICIES = {"normal": os.SCHED_OTHER, "batch": os.SCHED_BATCH, "idle": os.SCHED_IDLE}


def yield_to_others(*, niceness: int, scheduling: str) -> None:
    """Lower this process's priority. Neither needs a right; Linux applies both to the threads started from here on."""
    os.nice(niceness)
    os.sched_setscheduler(0, _POLICIES[scheduling], os.sched_param(0))
