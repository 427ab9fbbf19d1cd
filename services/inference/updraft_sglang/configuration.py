"""A server's configuration: the facts that Updraft reads, and what it does not support."""

from importlib import metadata
from typing import Any

from updraft_sglang import names
from updraft_tap import hooks, wire


def version() -> str:
    """The release of SGLang."""
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return "of unknown version"


def unsupported(worker: Any) -> str:
    """Why no rows can be captured; "" if they can."""
    if worker is None:
        return "capture requires --speculative-algorithm EAGLE3"
    own = getattr(type(worker), "forward_batch_generation", None)
    if own is not hooks.resolved(names.FORWARD):
        return f"capture requires EAGLE3, but this server speculates with {type(worker).__name__}"
    if not worker.speculative_algorithm.is_eagle3():
        return "capture requires --speculative-algorithm EAGLE3, for its auxiliary hidden states"
    if worker.topk != 1:
        return f"capture requires --speculative-eagle-topk 1, but it is {worker.topk}"
    return ""


def facts(worker: Any) -> dict[str, Any]:
    """Facts of the models for the hello of the worker's role."""
    from sglang.srt.speculative.eagle_utils import get_draft_input_from_target_hidden_dim  # noqa: PLC0415  (SGLang's)

    config = worker.target_worker.model_runner.model_config
    return {
        "device": str(worker.target_worker.model_runner.device),
        "steps": int(worker.speculative_num_steps),
        "aux_size": int(get_draft_input_from_target_hidden_dim(worker.draft_worker.draft_runner)),
        "vocab_size": int(config.vocab_size),
        "dtype": wire.NAMES[config.dtype],
        "quantization": str(getattr(config, "quantization", None) or ""),
    }


def is_sender() -> bool:
    """Whether this rank talks to the agent: the first one."""
    parallel = _parallel()
    return not any((parallel.tp_rank, parallel.pp_rank, parallel.dp_rank))


def replicas() -> str:
    """Why the requests of this server are not counted, nor captured; "" if they are. One scheduler must have them all."""
    parallel = _parallel()
    if parallel.pp_size > 1:
        return f"capture does not support pipeline parallelism (--pp-size), but it is {parallel.pp_size}"
    if parallel.attn_dp_size > 1:
        return "capture does not support data-parallel attention (--enable-dp-attention)"
    if parallel.dp_size > 1:
        return f"capture does not support {parallel.dp_size} replicas in one server (--dp-size): start one server per replica"
    return ""


def several_ranks() -> str:
    """Why the plugin swaps no drafts here; "" if it does."""
    size = _parallel().tp_size
    return f"the plugin swaps drafts of one rank of SGLang, but this server has {size} ranks" if size > 1 else ""


def place() -> tuple[int, int]:
    """This tensor-parallel rank, and how many there are."""
    parallel = _parallel()
    return int(parallel.tp_rank), int(parallel.tp_size)


def is_one_node() -> bool:
    """Whether all ranks are processes of one machine, so that all of them have the plugin and its settings."""
    from sglang.srt.runtime_context import get_server_args  # noqa: PLC0415  (SGLang's)

    return int(get_server_args().nnodes) == 1


def group() -> Any:
    """The torch group of the tensor-parallel ranks, on CPUs."""
    return _parallel().tp_group.cpu_group


def ranks() -> dict[str, int]:
    """Number of ranks by kind of parallelism."""
    parallel = _parallel()
    return {"tensor": int(parallel.tp_size), "pipeline": int(parallel.pp_size), "data": int(parallel.dp_size)}


def _parallel() -> Any:
    from sglang.srt.runtime_context import get_parallel  # noqa: PLC0415  (SGLang's)

    return get_parallel()
