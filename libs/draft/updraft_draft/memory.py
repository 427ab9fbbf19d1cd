"""Limits on memory that torch and the C library keep for reuse, set at the start of a process before torch is imported."""

import ctypes
from collections.abc import Mapping, MutableMapping
from contextlib import suppress

from updraft_chassis import heaps

KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Environment variables for the size of oneDNN's cache, and of a second one in torch that keeps the same kernels alive."""

_NUM_HEAPS = 2

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""Environment variable by which torch asks for pages of 2 MiB for tensors of more than that."""

RETURNED_BYTES = 8 * 1024 * 1024
"""Twice a chunk of a trace: buffers of chunks are used again, and those of whole requests are not kept."""

_M_MMAP_THRESHOLD = -3
_MMAP_VARIABLE = "MALLOC_MMAP_THRESHOLD_"


def limit(environ: MutableMapping[str, str], *, num_kernels: int) -> None:
    """Limit the kernels that are kept, and the heaps, except where the user has set a limit in the environment.

    oneDNN compiles a kernel of about 0.6 MB for every shape of a matrix product, in about a millisecond, and keeps 1,024 of
    them by default. Texts of all lengths fill that cache within minutes.
    """
    for variable in KERNEL_CACHES:
        environ.setdefault(variable, str(num_kernels))
    heaps.limit(environ, _NUM_HEAPS)


def return_large_blocks(environ: Mapping[str, str]) -> None:
    """Give each block of more than `RETURNED_BYTES` back to the system when it is freed, except where the user has set a
    threshold in the environment; does nothing without glibc. By default glibc learns to keep blocks of up to 32 MiB, which
    leave gaps in the heap. Costs a fault for each page of each new block, so it is nothing for a process that computes."""
    if _MMAP_VARIABLE not in environ:
        with suppress(AttributeError):
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, RETURNED_BYTES)


def use_huge_pages(environ: MutableMapping[str, str]) -> None:
    """For large tensors, unless the user has decided: a decoded trace takes new memory, and in pages of 4 kB the kernel needs
    longer to hand it over than decoding takes. A tensor may take up to 2 MiB more."""
    environ.setdefault(HUGE_PAGES, "1")


def release() -> None:
    """Give free memory between live allocations back to the system; does nothing without glibc. Takes milliseconds."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
