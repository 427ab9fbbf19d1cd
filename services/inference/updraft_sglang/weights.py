"""The custom weight loader, by which all ranks begin to serve a draft at the same step. SGLang calls `load` by its name.

Each rank has prepared its part of the draft before (`ranks.preparation`), so it only copies, and only if all ranks are ready.
The embedding is the target's own parameter and is never written. The map from draft to target tokens (d2t) is written
in place too, after `share_vocabulary` made it a buffer of the draft; SGLang itself reads it only at startup. A running request
has one proposal pending, which the next step reads with the new map: the target rejects it or not, as any other.

SGLang does not catch exceptions of a loader, so they would end the scheduler, and the server with it. The hook `answered`
wraps its caller, turns them into an error response, and serves the draft; without that hook, nothing is changed.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from updraft_sglang.draft import MAP
from updraft_sglang.ranks.preparation import PartlyError, Preparation
from updraft_tap import weights
from updraft_tap.weights import UNKNOWN, RefusedError

log = logging.getLogger(__name__)

LOADER = "updraft_sglang.weights.load"
PAYLOAD = "order"
"""The name of the only tensor that the loader gets: what the ranks were ordered to prepare, uint8."""


class ServedVersion(weights.ServedVersion):
    """The draft that was loaded last, and whether a refusal can be answered."""

    def __init__(self) -> None:
        super().__init__()
        self.is_answered = False
        """A caller up the stack turns exceptions into error responses."""
        self.is_mixed = False
        """A copy failed and was not undone, so each rank may hold another draft. Updates by others do not change that: they are
        alike in all."""
        self.asked: tuple[str, Any] = ("", None)
        """The order that the loader got last, and the model for it."""


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
    """AROUND WeightUpdater.update_weights_from_tensor(named_tensors, load_format): (False, reason) instead of an exception.

    All ranks get here, whatever fails in one of them, so here and not in `load` they agree.
    """
    load_format = kwargs.get("load_format", args[1] if len(args) > 1 else None)
    if load_format != LOADER:
        return original(updater, *args, **kwargs)
    served.asked, problem = ("", None), ""
    served.is_answered = True
    try:
        answer = original(updater, *args, **kwargs)
        if not answer[0]:  # SGLang has refused before it called the loader
            problem = str(answer[1])
    except Exception as error:  # noqa: BLE001  (any error would crash the server)
        problem = str(error) or type(error).__name__
    finally:
        served.is_answered = False
    return _served(problem)


def _served(problem: str) -> tuple[bool, str]:
    text, model = served.asked
    try:
        order = preparation.serve(text, model, problem)
    except RefusedError as error:
        log.error("Updraft refused a draft: %s", error)
        if isinstance(error, PartlyError):
            served.digest, served.is_mixed = UNKNOWN, True
        return False, str(error)
    except Exception as error:  # another release of SGLang
        log.exception("Updraft cannot load a draft")
        return False, f"{type(error).__name__}: {error}"
    served.version, served.digest, served.is_mixed = order.version, order.digest, False
    return True, "Success"


def load(model: Any, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Note which prepared draft is to be served by which model; `answered` does the rest.

    Raises RefusedError if a caller turns it into an error response.
    """
    try:
        served.asked = _text(named_tensors), model
    except Exception:  # any error would crash the server
        if served.is_answered:
            raise
        log.exception("Updraft refused a draft, and cannot report it in the response")
    else:
        if not served.is_answered:
            log.error("Updraft loads no draft, because a hook does not fit this release of SGLang")


def _text(named_tensors: Iterable[tuple[str, Tensor]]) -> str:
    payload = dict(named_tensors)
    if list(payload) != [PAYLOAD]:
        raise RefusedError(f"the payload has {sorted(payload)}, expected ['{PAYLOAD}']")
    return bytes(payload[PAYLOAD].tolist()).decode()
