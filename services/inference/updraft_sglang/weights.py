"""The custom weight loader, by which all ranks begin to serve a draft at the same step. SGLang calls `load` by its name.

Each rank has prepared its part of the draft before (`ranks.preparation`), so `load` only copies, and only if all ranks are
ready. The embedding is the target's own parameter and is never written. The map from draft to target tokens (d2t) is written
in place too, after `share_vocabulary` made it a buffer of the draft; SGLang itself reads it only at startup. A running request
has one proposal pending, which the next step reads with the new map: the target rejects it or not, as any other.

SGLang does not catch exceptions of a loader, so they would end the scheduler, and the server with it. The hook `answered`
wraps its caller and turns them into an error response; without that hook, `load` logs a refusal and changes nothing.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from updraft_sglang.draft import MAP
from updraft_sglang.ranks.preparation import Preparation, Prepared
from updraft_tap import weights
from updraft_tap.weights import UNKNOWN, RefusedError

log = logging.getLogger(__name__)

LOADER = "updraft_sglang.weights.load"
PAYLOAD = "attempt"
"""The name of the only tensor that the loader gets: the id of the preparation, uint8."""


class ServedVersion(weights.ServedVersion):
    """The draft that was loaded last, and whether a refusal can be answered."""

    def __init__(self) -> None:
        super().__init__()
        self.is_answered = False
        """A caller up the stack turns exceptions into error responses."""


served = ServedVersion()
"""One per process, because SGLang gives a loader no state of its own."""
preparation = Preparation(LOADER)
"""The same."""


def share_vocabulary(worker: Any) -> None:
    """Make the map that the worker drafts with a buffer of its draft: the loader finds it there, and checksums cover it.

    On a GPU the worker has a copy of the draft's, and CUDA graphs have recorded where that is.
    """
    drafting = worker.draft_worker
    model, token_ids = drafting.draft_runner.model, drafting.hot_token_id
    if token_ids is not None:
        delattr(model, MAP)
        model.register_buffer(MAP, token_ids, persistent=False)


def answered(original: Callable[..., Any], updater: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND WeightUpdater.update_weights_from_tensor(named_tensors, load_format): (False, reason) instead of an exception."""
    load_format = kwargs.get("load_format", args[1] if len(args) > 1 else None)
    if load_format != LOADER:
        return original(updater, *args, **kwargs)
    served.is_answered = True
    try:
        return original(updater, *args, **kwargs)
    except Exception as error:  # noqa: BLE001  (any error would crash the server)
        log.error("Updraft refused a draft: %s", error)
        return False, str(error) or type(error).__name__
    finally:
        served.is_answered = False


def load(model: Any, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Serve the draft that all ranks have prepared in this attempt.

    Raises RefusedError if a caller turns it into an error response.
    """
    try:
        prepared = preparation.take(_attempt(named_tensors), model)
        preparation.agree(_written(prepared))
    except Exception:  # any error would crash the server
        if served.is_answered:
            raise
        log.exception("Updraft refused a draft, and cannot report it in the response")
        return
    served.version, served.digest = prepared.order.version, prepared.order.digest


def _attempt(named_tensors: Iterable[tuple[str, Tensor]]) -> str:
    payload = dict(named_tensors)
    if list(payload) != [PAYLOAD]:
        raise RefusedError(f"the payload has {sorted(payload)}, expected ['{PAYLOAD}']")
    return bytes(payload[PAYLOAD].tolist()).decode()


def _written(prepared: Prepared) -> str:
    """Copy it. Returns why it was copied only in part; "" if all of it was."""
    served.digest = UNKNOWN
    try:
        _synchronize(prepared.model)  # the step before may still run
        for write in prepared.writes:
            write()
        _synchronize(prepared.model)
    except Exception as error:  # noqa: BLE001  (it is told)
        return f"the draft in {prepared.order.folder} was loaded only in part; load another one: {error}"
    return ""


def _synchronize(model: Any) -> None:
    device = model.model.fc.weight.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
