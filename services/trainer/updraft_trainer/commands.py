"""Commands of rank 0 to the other ranks. Every rank carries a command out, rank 0 as well.

All collective operations belong to a command, and one thread of each rank carries them out in order, so no two ranks wait for
different things. The `activity` of a command is what a rank is busy with meanwhile. A command may contain tensors of any size.
"""

import io
import pickle
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from updraft_draft.config import DraftConfig
from updraft_trainer.coordination.ranks import Ranks
from updraft_trainer.coordination.watch import Activity

_NO_TIMEOUT = timedelta(days=365)
"""Rank 0 may wait for days for the first requests. If it is gone, its connections are too, or else torchrun notices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftTensors:
    """A draft on its way: the tensors of its checkpoint."""

    config: DraftConfig
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class ShareSamples:
    """Send samples of up to `count` requests, for a new draft."""

    activity: ClassVar[Activity] = Activity.FIRST_DRAFT

    count: int


@dataclass(frozen=True, slots=True)
class ShareFitted:
    """Send this rank's samples for a fit in closed form."""

    activity: ClassVar[Activity] = Activity.FIT


@dataclass(frozen=True, slots=True)
class EndFit:
    """The fit is over. `is_used`: its draft is served or trained, so count the samples that were sent for it as used."""

    activity: ClassVar[Activity] = Activity.FIT

    is_used: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadLearner:
    """Train this learner from now on. `learner`: the state of a learner of this shape and vocabulary (int64 [V])."""

    activity: ClassVar[Activity] = Activity.LOAD

    config: DraftConfig
    token_ids: Tensor
    learner: Mapping[str, Any]
    uses: Mapping[str, int] | None
    """How often the draft was trained on each sample, of all ranks; None: as before."""
    counted: Collection[str] | None
    """The data folders whose samples `uses` counts: the draft may have learned from all that others stored before their
    process started. None: it has learned from nothing else."""


@dataclass(frozen=True, slots=True)
class TakeStep:
    """Take an optimizer step on samples of the own replay."""

    activity: ClassVar[Activity] = Activity.STEP


@dataclass(frozen=True, slots=True)
class MarkGood:
    """Keep the averaged weights, to restore them if training diverges."""

    activity: ClassVar[Activity] = Activity.MARK_GOOD


@dataclass(frozen=True, slots=True)
class SetBaseline:
    """Compare candidates with this draft from now on; None: with no draft."""

    activity: ClassVar[Activity] = Activity.BASELINE

    version: int
    draft: DraftTensors | None


@dataclass(frozen=True, slots=True)
class Estimate:
    """Send evidence on this candidate."""

    activity: ClassVar[Activity] = Activity.ESTIMATE

    draft: DraftTensors


@dataclass(frozen=True, slots=True)
class Collect:
    """Send what this rank holds of the learner's state."""

    activity: ClassVar[Activity] = Activity.COLLECT


@dataclass(frozen=True, slots=True)
class ReportUses:
    """Send how often each sample was trained on."""

    activity: ClassVar[Activity] = Activity.SAVE


@dataclass(frozen=True, slots=True)
class ReportTenants:
    """Send the tenants that this rank's samples were from, and whether there were more."""

    activity: ClassVar[Activity] = Activity.SAVE


@dataclass(frozen=True, slots=True)
class End:
    """There is no other command after this one."""

    activity: ClassVar[Activity] = Activity.END


WorkCommand: TypeAlias = (
    ShareSamples
    | ShareFitted
    | EndFit
    | LoadLearner
    | TakeStep
    | MarkGood
    | SetBaseline
    | Estimate
    | Collect
    | ReportUses
    | ReportTenants
)
Command: TypeAlias = WorkCommand | End


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outline:
    """A pickled command without its tensors, and their shapes, dtypes and types of device."""

    content: bytes
    tensors: list[tuple[torch.Size, torch.dtype, str]]


class CommandChannel:
    """From rank 0 to all others. It is opened by all ranks at the same time."""

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        """`device`: where this rank has the tensors of commands that are not on a CPU at rank 0."""
        self._ranks = ranks
        self._device = device
        self._group = dist.new_group(backend="gloo", timeout=_NO_TIMEOUT) if ranks.size > 1 else None

    def send(self, command: Command) -> None:
        """At rank 0."""
        tensors: list[Tensor] = []
        content = _outlined(command, tensors)
        kinds = [(tensor.shape, tensor.dtype, tensor.device.type) for tensor in tensors]
        self._share(_Outline(content=content, tensors=kinds))
        self._ranks.broadcast([tensor.detach().contiguous() for tensor in tensors])

    def receive(self) -> Command:
        """Elsewhere. Wait as long as it takes; Unavailable if rank 0 is gone."""
        outline = self._share(None)
        tensors = [
            torch.empty(shape, dtype=dtype, device="cpu" if kind == "cpu" else self._device)
            for shape, dtype, kind in outline.tensors
        ]
        self._ranks.broadcast(tensors)
        command: Command = _Filled(outline.content, tensors).load()
        return command

    def _share(self, outline: _Outline | None) -> _Outline:
        objects = [outline]
        with self._ranks.collective_errors():
            dist.broadcast_object_list(objects, src=0, group=self._group, device=torch.device("cpu"))
        (shared,) = objects
        assert shared is not None, "rank 0 sends one"
        return shared


def _outlined(command: Command, tensors: list[Tensor]) -> bytes:
    """The pickled command, whose tensors are appended to `tensors` instead."""
    file = io.BytesIO()
    _Outliner(file, tensors).dump(command)
    return file.getvalue()


class _Outliner(pickle.Pickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_id(self, obj: object) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        self._tensors.append(obj)
        return len(self._tensors) - 1


class _Filled(pickle.Unpickler):
    def __init__(self, content: bytes, tensors: list[Tensor]) -> None:
        super().__init__(io.BytesIO(content))
        self._tensors = tensors

    def persistent_load(self, pid: int) -> Tensor:
        return self._tensors[pid]
