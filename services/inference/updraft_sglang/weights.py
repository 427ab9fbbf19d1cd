"""The custom weight loader, which loads a checkpoint folder into the served draft. SGLang calls `load` by its dotted name.

Everything is checked before the first write. The embedding is the target's own parameter and is never written. The map from
draft to target tokens (d2t) is written in place too, after `share_vocabulary` made it a buffer of the draft; SGLang itself
reads it only at startup. A running request has one proposal pending, which the next step reads with the new map: the target
rejects it or not, as any other.

SGLang does not catch exceptions of a loader, so they would end the scheduler, and the server with it. The hook `answered`
wraps its caller and turns them into an error response; without that hook, `load` logs a refusal and changes nothing.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from updraft_tap import weights
from updraft_tap.weights import VOCABULARY, RefusedError, served_name, target_ids

log = logging.getLogger(__name__)

LOADER = "updraft_sglang.weights.load"
PAYLOAD = ("folder", "version", "digest")
_MAP = "hot_token_id"
"""SGLang's name for the map: the target's token of each draft token, int64 [V]."""


class ServedVersion(weights.ServedVersion):
    """The draft that was loaded last, and whether a refusal can be answered."""

    def __init__(self) -> None:
        super().__init__()
        self.is_answered = False
        """A caller up the stack turns exceptions into error responses."""


served = ServedVersion()
"""One per process, because SGLang gives a loader no state of its own."""


def share_vocabulary(worker: Any) -> None:
    """Make the map that the worker drafts with a buffer of its draft: the loader finds it there, and checksums cover it.

    On a GPU the worker has a copy of the draft's, and CUDA graphs have recorded where that is.
    """
    drafting = worker.draft_worker
    model, token_ids = drafting.draft_runner.model, drafting.hot_token_id
    if token_ids is not None:
        delattr(model, _MAP)
        model.register_buffer(_MAP, token_ids, persistent=False)


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
    """Serve the draft in `folder` (its path, uint8) as `version` (int64) with `digest` (of its tensors, uint8).

    Raises RefusedError if a caller turns it into an error response.
    """
    try:
        payload = _payload(named_tensors)
        folder, version, digest = Path(_text(payload["folder"])), int(payload["version"]), _text(payload["digest"])
        _write(model, checked(model, folder), folder)
    except Exception:  # any error would crash the server
        if served.is_answered:
            raise
        log.exception("Updraft refused a draft, and cannot report it in the response")
        return
    served.version, served.digest = version, digest


def checked(model: Any, folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder that fits the served draft. Raises RefusedError."""
    _check_is_draft(model)
    tensors = weights.read(folder, model.config, model.model.fc.weight.shape[1])
    _check_parameters(model, tensors)
    if not _is_shared(model) and not torch.equal(model.hot_token_id.cpu(), target_ids(tensors["d2t"])):
        raise RefusedError(
            "the draft has another vocabulary (d2t) than the served one, and the plugin did not find the server's map; "
            "restart the server with this draft as --speculative-draft-model-path",
        )
    return tensors


def _payload(named_tensors: Iterable[tuple[str, Tensor]]) -> Mapping[str, Tensor]:
    payload = dict(named_tensors)
    if sorted(payload) != sorted(PAYLOAD):
        raise RefusedError(f"the payload has {sorted(payload)}, expected {sorted(PAYLOAD)}")
    return payload


def _text(values: Tensor) -> str:
    return bytes(values.tolist()).decode()


def _check_is_draft(model: Any) -> None:
    if getattr(model, "hot_token_id", None) is None or not hasattr(getattr(model, "model", None), "fc"):
        raise RefusedError(
            f"{type(model).__name__} is not an EAGLE-3 draft with its own vocabulary; send selector=draft"
        )
    if getattr(model, "load_lm_head_from_target", False):
        raise RefusedError(
            "the served draft shares its head with the target; start the server with a draft that has its own head"
        )


def _check_parameters(model: Any, tensors: Mapping[str, Tensor]) -> None:
    serving = {name.removeprefix("model.") for name, _ in model.named_parameters()} - {"embed_tokens.weight"}
    written = {served_name(name) for name in tensors.keys() - set(VOCABULARY)}
    if serving != written:
        raise RefusedError(
            f"the served draft has the parameters {sorted(serving)}, but the checkpoint has {sorted(written)}"
        )


def _is_shared(model: Any) -> bool:
    return any(name == _MAP for name, _ in model.named_buffers(recurse=False))


def _write(model: Any, tensors: Mapping[str, Tensor], folder: Path) -> None:
    try:
        model.load_weights((name, tensor) for name, tensor in tensors.items() if name not in VOCABULARY)
        if _is_shared(model):
            model.hot_token_id.copy_(target_ids(tensors["d2t"]))
    except Exception as error:
        served.digest = ""
        raise RefusedError(f"the draft in {folder} was loaded only in part; load another one: {error}") from error
