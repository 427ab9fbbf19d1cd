"""The number of glibc's heaps in this process."""

import ctypes
from collections.abc import Mapping
from contextlib import suppress

_M_ARENA_MAX = -8
"""The parameter of `mallopt`, as malloc.h numbers it."""


def limit(environ: Mapping[str, str], number: int) -> None:
    """Let all threads share this many heaps, unless the user has set MALLOC_ARENA_MAX; does nothing without glibc.

    By default each thread gets a heap of its own, up to eight for each CPU, and each heap keeps freed memory that the other
    threads cannot use. Call it before threads start: a thread keeps the heap that it has.
    """
    if "MALLOC_ARENA_MAX" not in environ:
        with suppress(AttributeError):
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, number)
