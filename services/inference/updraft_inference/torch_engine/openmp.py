"""How long a thread of OpenMP that waits for work looks for it before it sleeps: said before torch, which reads it once."""

from collections.abc import MutableMapping

VARIABLE = "GOMP_SPINCOUNT"
SPINS = 4000
"""Some 80 microseconds: longer than the gaps between most operations of a step. What OpenMP does by itself, 300,000, is a
little faster on cores that nobody else uses; where somebody does, threads that look for work keep off those that have it, and
a step may last several times as long (`python -m bench.serving.pools`)."""


def wait_briefly(environ: MutableMapping[str, str]) -> None:
    """Unless the user has said how to wait."""
    if not environ.keys() & {VARIABLE, "OMP_WAIT_POLICY"}:
        environ[VARIABLE] = str(SPINS)
