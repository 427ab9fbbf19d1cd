"""The custom weight loader, which loads a checkpoint folder into the served draft. SGLang calls `load` by its dotted name.

Everything is checked before the first write. The embedding is the target's own parameter and is never written. The map from
draft to target tokens (d2t) is written in place too, after `share_vocabulary` made it a buffer of the draft; SGLang itself
reads it only at startup. A running request has one proposal pending, which the next step reads with the new map: the target
rejects it or not, as any other.

SGLang does not catch exceptions of a loader, so they would end the scheduler, and the server with it. The hook `answered`
wraps its caller and turns them into an error response; without that hook, `load` logs a refusal and changes nothing.
"""

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

log = logging.getLogger(__name__)

LOADER = "updraft_sglang.weights.load"
PAYLOAD = ("folder", "version", "digest")
_VOCABULARY = ("d2t", "t2d")
_MAP = "hot_token_id"
"""SGLang's name for the map: the target's token of each draft token, int64 [V]."""
_SHAPE_KEYS = ("vocab_size", "draft_vocab_size", "hidden_size", "target_hidden_size", "intermediate_size")
_HEAD_KEYS = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "updraft")
_JOINED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


class RefusedError(Exception):
    """The draft cannot be served. The previous one stays, unless the message says otherwise.

    The refusal may be temporary, because the agent has already validated the folder.
    """


class ServedVersion:
    """The draft that was loaded last; version 0 and "" for the one that the server started with."""

    def __init__(self) -> None:
        self.version = 0
        self.digest = ""
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
    try:
        config = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise RefusedError(f"cannot read the draft in {folder}: {error}") from error
    _check_config(model.config, config)
    _check_names_and_shapes(model, tensors)
    _check_vocabulary(model, tensors["d2t"])
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise RefusedError(f"{name} has values that are not finite")
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


def _check_config(serving: Any, config: Mapping[str, Any]) -> None:
    for key in (*_SHAPE_KEYS, *_HEAD_KEYS):
        now, then = getattr(serving, key, None), config.get(key)
        if now is not None and then is not None and now != then:
            raise RefusedError(f"{key} is {then} in the draft's config.json, but {now} in the served draft")


def _check_names_and_shapes(model: Any, tensors: Mapping[str, Tensor]) -> None:
    expected = expected_shapes(model.config, model.model.fc.weight.shape[1])
    if tensors.keys() != expected.keys():
        missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
        raise RefusedError(f"the draft lacks {missing} and has unknown {unknown}")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise RefusedError(f"{name} has shape {tuple(tensors[name].shape)}, but the served draft needs {shape}")
    serving = {name.removeprefix("model.") for name, _ in model.named_parameters()} - {"embed_tokens.weight"}
    written = {_served_name(name) for name in tensors.keys() - set(_VOCABULARY)}
    if serving != written:
        raise RefusedError(
            f"the served draft has the parameters {sorted(serving)}, but the checkpoint has {sorted(written)}"
        )


def expected_shapes(config: Any, aux: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint of Updraft, from the served draft's config and input width."""
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.draft_vocab_size
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    heads, kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    layer = {
        "self_attn.q_proj": (heads, 2 * hidden),
        "self_attn.k_proj": (kv, 2 * hidden),
        "self_attn.v_proj": (kv, 2 * hidden),
        "self_attn.o_proj": (hidden, heads),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "hidden_norm": (hidden,),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    return {
        "fc.weight": (hidden, aux),
        "norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
        "d2t": (vocab,),
        "t2d": (config.vocab_size,),
        **{f"midlayer.{name}.weight": shape for name, shape in layer.items()},
    }


def _served_name(name: str) -> str:
    """The parameter of SGLang's draft that contains a tensor of the checkpoint."""
    parts = name.replace("midlayer.", "layers.0.").split(".")
    return ".".join(_JOINED.get(part, part) for part in parts)


def _check_vocabulary(model: Any, d2t: Tensor) -> None:
    token_ids = _token_ids(d2t)
    if token_ids.min() < 0 or token_ids.max() >= model.config.vocab_size:  # a GPU would stop at the first such token
        raise RefusedError("d2t maps to tokens that the target does not have")
    if not _is_shared(model) and not torch.equal(model.hot_token_id.cpu(), token_ids):
        raise RefusedError(
            "the draft has another vocabulary (d2t) than the served one, and the plugin did not find the server's map; "
            "restart the server with this draft as --speculative-draft-model-path",
        )


def _token_ids(d2t: Tensor) -> Tensor:
    return d2t + torch.arange(len(d2t))


def _is_shared(model: Any) -> bool:
    return any(name == _MAP for name, _ in model.named_buffers(recurse=False))


def _is_finite(tensor: Tensor) -> bool:
    least, most = tensor.aminmax()  # one pass, no copy; NaN propagates
    return math.isfinite(least) and math.isfinite(most)


def _write(model: Any, tensors: Mapping[str, Tensor], folder: Path) -> None:
    try:
        model.load_weights((name, tensor) for name, tensor in tensors.items() if name not in _VOCABULARY)
        if _is_shared(model):
            model.hot_token_id.copy_(_token_ids(tensors["d2t"]))
    except Exception as error:
        served.digest = ""
        raise RefusedError(f"the draft in {folder} was loaded only in part; load another one: {error}") from error
