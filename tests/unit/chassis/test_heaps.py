"""Threads share heaps, unless the user has said how many there are."""

import ctypes
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="of glibc")

THREADS = """
import ctypes, os, sys, threading
from updraft_chassis import heaps
heaps.limit(os.environ, 2)
libc, everyone = ctypes.CDLL(None), threading.Barrier(8)
libc.malloc.restype = ctypes.c_void_p

def allocate():
    everyone.wait()
    libc.malloc(100_000)
    everyone.wait()

threads = [threading.Thread(target=allocate) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
sys.stdout.flush()
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
"""


@pytest.mark.parametrize(("own", "number"), [({}, 2), ({"MALLOC_ARENA_MAX": "3"}, 3)])
def test_threads_share_so_many_heaps(own: dict[str, str], number: int) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"} | own
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, check=True, text=True, env=environ)
    assert done.stdout.count("<heap nr=") == number
