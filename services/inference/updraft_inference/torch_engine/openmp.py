"""How long OpenMP threads spin for work before they sleep. It must be set before torch is imported, which reads it once."""

from collections.abc import MutableMapping

VARIABLE = "GOMP_SPINCOUNT"
SPINS = 4000
"""About 80 microseconds, longer than the gaps between most operations of a step. OpenMP's default of 300,000 is a little faster
on idle cores. On busy ones, spinning threads keep working threads off the cores, and a step may take several times as long
(ADR 0025)."""


def wait_briefly(environ: MutableMapping[str, str]) -> None:
    """Set the spin count, unless the user has set it."""
    if not environ.keys() & {VARIABLE, "OMP_WAIT_POLICY"}:
        environ[VARIABLE] = str(SPINS)
