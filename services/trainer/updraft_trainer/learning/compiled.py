"""Parts of a step through torch.compile: those between attention and attention, and the losses.

The kernels of attention and the products are called as ever; what is compiled are the many small operations beside them, fused
into few. Sizes that differ from batch to batch stay variables of the compiled code, so that no batch has it made again.
"""

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from updraft_draft.target_weights import TargetHead
from updraft_draft.tensors import EncodedRows
from updraft_trainer.data.sample import Counterfactual, Sample
from updraft_trainer.data.teacher import LastHidden

logger = logging.getLogger(__name__)

_MAX_REASON = 300
"""Characters of a compiler's complaint."""


class Compiler:
    """Compiles parts of a step for all learners of a process, until that fails once."""

    def __init__(self) -> None:
        self.has_failed = False
        self.is_warm = False
        """Whether all that is compiled at the start is."""
        self.during: Callable[[], AbstractContextManager[object]] = nullcontext
        """Entered while it warms up."""
        self._compiled: dict[Callable[..., Any], Callable[..., Any]] = {}

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, compiled at its first call; as it is, after a failure."""
        if self.has_failed:
            return function
        if function not in self._compiled:
            self._compiled[function] = torch.compile(function, dynamic=True)
        return self._compiled[function]

    def warm_up(self, run: Callable[[], object]) -> float:
        """Call `run`, which uses compiled functions, for the first learner; that takes from seconds to minutes, which are
        returned."""
        if self.is_warm:
            return 0.0
        self.is_warm = True
        logger.info("Compiling the training step, which may take minutes")
        start_s = time.monotonic()
        try:
            with self.during():
                run()
        except compiler_error() as error:
            self.give_up(error)
        seconds = time.monotonic() - start_s
        if not self.has_failed:
            logger.info("Compiled the training step", extra={"seconds": round(seconds, 1)})
        return seconds

    def give_up(self, error: Exception) -> None:
        """Compile nothing from now on."""
        self.has_failed = True
        self._compiled.clear()
        reason = str(error).strip().splitlines()[0][:_MAX_REASON]
        logger.warning("Training goes on without torch.compile, because it does not work here: %s", reason)


def compiler_error() -> type[Exception]:
    """Raised by functions that cannot be compiled, also for other sizes than before."""
    from torch._dynamo.exc import TorchDynamoException  # noqa: PLC0415 - takes a second to import

    return TorchDynamoException


def warm_up_sample(target: TargetHead, token: Tensor, num_rows: int, *, has_branch: bool) -> Sample:
    """A sample of one repeated token, whose states are all zero."""
    c = target.config
    aux = EncodedRows.of(torch.zeros(num_rows, len(c.aux_layers) * c.hidden_size))
    states = torch.zeros(num_rows, c.hidden_size)
    branch = Counterfactual(start=num_rows // 2, ids=token.repeat(2), aux=aux[:2], teacher=LastHidden(states[:2]))
    return Sample(
        trace_id="",
        aux=aux,
        teacher=LastHidden(states),
        ids=token.repeat(num_rows + 1),
        first_output=num_rows // 4,
        corrections=torch.zeros(num_rows + 1, dtype=torch.bool),
        is_evaluation=False,
        domain="",
        finished_unix_ms=0,
        counterfactuals=(branch,) if has_branch else (),
    )
