"""Ranks as real processes that join each other by gloo, as torchrun starts them."""

import io
import multiprocessing
import os
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

import torch
from torch._C._distributed_c10d import TCPStore

from updraft_trainer.coordination.ranks import joined

T = TypeVar("T")

TIMEOUT_S = 280.0
"""Less than the limit of a test, so that its failure names the ranks. On a busy machine ranks take minutes."""


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """The variables that torchrun sets for a rank whose agent holds the store at `port`."""
    variables = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "MASTER_PORT": port,
        "TORCHELASTIC_RESTART_COUNT": 0,
    }
    texts = {name: str(value) for name, value in variables.items()}
    return texts | {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}


def run_ranks(function: Callable[..., T], *arguments: object, size: int = 2) -> list[T]:
    """The results of `function(ranks, *arguments)`, one for each rank in order, each in a process with one thread.

    The function must be at the top level of a module; arguments and results are pickled. The first error is raised.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    call = _pickled((function, arguments))
    with ProcessPoolExecutor(size, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        runs = [pool.submit(_run, environment(rank, size, store.port), call) for rank in range(size)]
        return [_unpickled(run.result(TIMEOUT_S)) for run in runs]


def _run(variables: dict[str, str], call: bytes) -> bytes:
    os.environ.update(variables)
    torch.set_num_threads(1)
    function, arguments = _unpickled(call)
    try:
        with joined(variables, torch.device("cpu")) as ranks:
            return _pickled(function(ranks, *arguments))
    except Exception as error:
        error.add_note(traceback.format_exc())
        raise


def _pickled(value: object) -> bytes:
    """Not by the queue of the pool, which shares the memory of tensors: that of a process that has ended is gone."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _unpickled(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=False)
