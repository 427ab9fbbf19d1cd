"""The processes that train one draft together ("ranks"), which torchrun starts and restarts together.

Rank 0 leads. Every operation here is collective: all ranks call it, in the same order, each from one thread. A rank that dies
ends the operation of the others with Unavailable; torchrun then restarts all of them. Objects travel by gloo, and so do
tensors of a CPU; tensors of GPUs travel by NCCL. Objects are pickled, which the ranks of one trainer may do among themselves.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from updraft_chassis.errors import Conflict, InvalidInput, Unavailable
from updraft_trainer.coordination.store_rendezvous import join_store

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""The longest that a rank waits for another one. Rank 0 may judge a draft or wait for the registry meanwhile, so it is far
above what a collective takes. A rank whose process is gone is noticed at once."""

JOIN_TIMEOUT = timedelta(minutes=10)
"""The longest that a rank waits for the others at a start: their pods may have to be scheduled first."""

BUCKET_BYTES = 1024**2
"""Small tensors are exchanged together in flat buckets of at most this size, larger ones in place: copies of them would cost
more than the calls that they save."""

_LOST = re.compile(r"connection|timed? ?out|broken pipe|socket|peer", re.IGNORECASE)
"""In gloo's errors about another process, which have no class of their own. NCCL's have."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process's place among `size` ranks. `local_rank`: its place on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    waiting: Callable[[], AbstractContextManager[None]] = field(default=nullcontext, compare=False, repr=False)
    """Entered during collective operations."""

    @property
    def leads(self) -> bool:
        """Whether this rank decides, publishes and saves."""
        return self.rank == 0

    def per_rank(self, count: int) -> int:
        """The share of each rank in `count` of all, rounded up."""
        return -(-count // self.size)

    def check_agreement(self, facts: Mapping[str, str]) -> None:
        """Conflict everywhere if a rank has other facts, by their names, than rank 0. The sentence names the rank."""
        everyone = self.gather(facts)
        if sentence := self.broadcast_object(_disagreement(everyone) if self.leads else ""):
            raise Conflict(sentence)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all ranks, the same bits everywhere."""
        if self.size > 1:
            with self.collective_errors():
                for bucket in buckets(tensors):
                    _sum(bucket)

    def broadcast(self, tensors: Sequence[Tensor], source: int = 0) -> None:
        """Replace each tensor by that of rank `source`."""
        if self.size > 1:
            with self.collective_errors():
                for bucket in buckets(tensors):
                    _broadcast(bucket, source)

    def broadcast_object(self, value: T | None = None) -> T:
        """Return the value of rank 0, an object that can be pickled. The other ranks pass none."""
        objects = [value]
        if self.size > 1:
            with self.collective_errors():
                dist.broadcast_object_list(objects, src=0, device=torch.device("cpu"))
        return cast("T", objects[0])

    def gather(self, value: T) -> list[T]:
        """At rank 0 the values of all ranks, in order; elsewhere nothing."""
        if self.size == 1:
            return [value]
        values = [value] * self.size if self.leads else None
        with self.collective_errors():
            dist.gather_object(value, values)
        return values or []

    def concatenated(self, part: Tensor, sizes: Sequence[int]) -> Tensor:
        """At rank 0 the parts of all ranks one after another in host memory; elsewhere nothing. They have one dimension and
        these sizes."""
        with self.collective_errors():
            if not self.leads:
                if len(part):
                    dist.send(part.contiguous(), 0)
                return part.new_empty(0)
            parts = [part.cpu()]
            for rank, size in enumerate(sizes[1:], start=1):
                received = part.new_empty(size)
                if size:
                    dist.recv(received, rank)
                parts.append(received.cpu())
            return torch.cat(parts)

    @contextmanager
    def collective_errors(self) -> Iterator[None]:
        """Raise Unavailable if another rank is gone or does not answer in time, or if a collective operation fails."""
        try:
            with self.waiting():
                yield
        except dist.DistError as error:
            raise self._unavailable(error) from error
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> Unavailable:
        is_lost = isinstance(error, dist.DistError) or _LOST.search(str(error))
        reason = f"has lost another rank, and ends to be restarted: {_reason(error)}"
        if not is_lost:
            reason = f"ends to be restarted, because a collective operation failed: {_reason(error)}"
        return Unavailable(f"rank {self.rank} of {self.size} {reason}")


ALONE = Ranks()
"""One process, for which the operations do nothing."""


@contextmanager
def joined(
    environment: Mapping[str, str],
    device: torch.device,
    timeout: timedelta = TIMEOUT,
    check: Callable[[], None] = lambda: None,
) -> Iterator[Ranks]:
    """The ranks that torchrun started, whose process group lasts as long as the block. `environment` is this process's.

    Without WORLD_SIZE in it, or with 1, this process is alone. InvalidInput if a variable is missing or no number, Conflict
    if no GPU is left for this rank, Unavailable if the others do not come in time.
    `check` is called meanwhile and may end the waiting by an exception.
    """
    ranks = from_environment(environment)
    if ranks.size == 1:
        yield ranks
        return
    if device.type == "cuda":
        _use_gpu(ranks.local_rank)
    place = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        limit = min(timeout, JOIN_TIMEOUT)
        store, _, _ = next(rendezvous("env://", ranks.rank, ranks.size, timeout=limit))
        store = join_store(store, ranks.rank, ranks.size, limit, check)
        dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.size, timeout=timeout)
    except (dist.DistError, RuntimeError, ValueError, TimeoutError) as error:
        reason = _reason(error)
        raise Unavailable(f"rank {ranks.rank} of {ranks.size} cannot join the others at {place}: {reason}") from error
    try:
        yield ranks
    finally:
        dist.destroy_process_group()


def _use_gpu(local_rank: int) -> None:
    """Each rank has a GPU of its own. Conflict if this machine has too few."""
    num_gpus = torch.cuda.device_count()
    if local_rank >= num_gpus:
        raise Conflict(
            f"local rank {local_rank} needs a GPU of its own, but this machine has {num_gpus}; start at most one rank for each"
            " GPU, or set UPDRAFT_TRAINER_DEVICE to cpu"
        )
    torch.cuda.set_device(local_rank)


def from_environment(environment: Mapping[str, str]) -> Ranks:
    """This process's place by torchrun's variables, without joining the others. InvalidInput as for `joined`."""
    if "WORLD_SIZE" not in environment:
        return ALONE
    size, rank, local_rank = (_number(environment, name) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
    if size < 1 or rank >= size:
        raise InvalidInput(f"RANK is {rank} and WORLD_SIZE is {size}; ranks count from 0")
    if size > 1:
        _number(environment, "MASTER_PORT")
        if not environment.get("MASTER_ADDR"):
            raise InvalidInput("WORLD_SIZE is set, but MASTER_ADDR is not; start the ranks with torchrun")
    return Ranks(rank, size, local_rank)


def local_size(environment: Mapping[str, str]) -> int:
    """Ranks on this machine."""
    return _number(environment, "LOCAL_WORLD_SIZE") if "WORLD_SIZE" in environment else 1


def buckets(tensors: Sequence[Tensor], limit_bytes: int = BUCKET_BYTES) -> Iterator[list[Tensor]]:
    """The tensors, in groups of one dtype and device that together have at most `limit_bytes`; a larger one is alone."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        group = groups.setdefault((tensor.dtype, tensor.device), [])
        if group and sum(one.nbytes for one in group) + tensor.nbytes > limit_bytes:
            yield group.copy()
            group.clear()
        group.append(tensor)
    yield from groups.values()


def _disagreement(everyone: Sequence[Mapping[str, str]]) -> str:
    """A sentence on the first difference from rank 0; empty if there is none."""
    expected = everyone[0]
    for rank, facts in enumerate(everyone):
        for name, value in facts.items():
            if value != expected[name]:
                return (
                    f"rank {rank} has the {name} {value}, but rank 0 has {expected[name]}; all ranks need the same model and"
                    " settings"
                )
    return ""


def _sum(bucket: Sequence[Tensor]) -> None:
    if len(bucket) == 1 and bucket[0].is_contiguous():
        dist.all_reduce(bucket[0])
        return
    flat = _flat(bucket)
    dist.all_reduce(flat)
    _restore(bucket, flat)


def _broadcast(bucket: Sequence[Tensor], source: int) -> None:
    if len(bucket) == 1 and bucket[0].is_contiguous():
        dist.broadcast(bucket[0], source)
        return
    flat = _flat(bucket)
    dist.broadcast(flat, source)
    if dist.get_rank() != source:
        _restore(bucket, flat)


def _flat(bucket: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in bucket])


def _restore(bucket: Sequence[Tensor], flat: Tensor) -> None:
    for tensor, part in zip(bucket, torch.split(flat, [tensor.numel() for tensor in bucket]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _reason(error: Exception) -> str:
    """The first sentence, without the place in gloo's or NCCL's source before it and the advice after it."""
    line = str(error).splitlines()[0]
    return re.sub(r"^\[[^ \]]*\] ", "", line).partition(". ")[0]


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    if not value.isdecimal():
        raise InvalidInput(
            f"WORLD_SIZE is set, but {name} is {value or 'not'}{', no number' if value else ''};"
            " start the ranks with torchrun"
        )
    return int(value)
