"""Parts of a step through torch.compile: those between attention and attention, and the losses.

The kernels of attention and the products are called as ever; what is compiled are the many small operations beside them, fused
into few. Sizes that differ from batch to batch stay variables of the compiled code, so that no batch has it made again.
"""

import logging
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from updraft_draft.network import Part, plain
from updraft_draft.target_weights import TargetHead
from updraft_trainer.data.sample import Counterfactual, Sample
from updraft_trainer.data.teacher import LastHidden

logger = logging.getLogger(__name__)

_MAX_REASON = 300
"""Characters of a compiler's complaint."""


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, compiled at its first call; once for all learners."""
    made: Callable[..., Any] = torch.compile(function, dynamic=True)
    return made


def warmed_up(run: Callable[[Part], object]) -> Part:
    """`compiled` after `run` has worked with it, which takes from seconds to minutes. `plain` if no compiler works here."""
    from torch._dynamo.exc import TorchDynamoException  # noqa: PLC0415 - takes a second to import

    logger.info("Compiling the training step, which may take minutes")
    start_s = time.monotonic()
    try:
        run(compiled)
    except TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0][:_MAX_REASON]
        logger.warning("Training goes on without torch.compile, because it does not work here: %s", reason)
        return plain
    logger.info("Compiled the training step", extra={"seconds": round(time.monotonic() - start_s, 1)})
    return compiled


def silence(target: TargetHead, token: Tensor, num_rows: int, *, has_branch: bool) -> Sample:
    """A sample whose states are all zero, of one token again and again."""
    c = target.config
    aux, states = torch.zeros(num_rows, len(c.aux_layers) * c.hidden_size), torch.zeros(num_rows, c.hidden_size)
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
