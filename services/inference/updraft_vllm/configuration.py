"""A vLLM server's configuration: the facts that Updraft reads, and what it does not support."""

from typing import Any


def version() -> str:
    """The release of vLLM."""
    try:
        import vllm  # noqa: PLC0415  (the server's)

        return str(vllm.__version__)
    except (ImportError, AttributeError):
        return "of unknown version"


def ranks(parallel: Any) -> dict[str, int]:
    """Number of ranks by kind of parallelism."""
    return {
        "tensor": int(parallel.tensor_parallel_size),
        "pipeline": int(parallel.pipeline_parallel_size),
        "data": int(parallel.data_parallel_size),
    }


def has_several(parallel: Any) -> bool:
    """Whether several tensor-parallel ranks hold a part of the draft each."""
    return ranks(parallel)["tensor"] > 1


def replicas(parallel: Any) -> str:
    """Why requests are not even counted; "" if they are. Data-parallel replicas have a scheduler each."""
    size = ranks(parallel)["data"]
    return f"{_unsupported_ranks('data', size)}: start one server per replica" if size > 1 else ""


def unsupported(config: Any) -> str:
    """Why nothing can be captured; "" if it can."""
    speculative, parallel = config.speculative_config, config.parallel_config
    if speculative is None or speculative.method != "eagle3":
        return 'capture requires --speculative-config with the method "eagle3"'
    contexts = {name: int(getattr(parallel, f"{name}_context_parallel_size", 1)) for name in ("prefill", "decode")}
    sizes = {**ranks(parallel), **{f"{name} context": size for name, size in contexts.items()}}
    others = ((name, size) for name, size in sizes.items() if name != "tensor" and size > 1)
    return next((_unsupported_ranks(name, size) for name, size in others), "") or _unsupported_executor(parallel)


def _unsupported_ranks(name: str, size: int) -> str:
    return f"Updraft supports only tensor parallelism of vLLM, but {name} parallelism is {size}"


def _unsupported_executor(parallel: Any) -> str:
    """Ranks must be processes of one machine, which read the same folders and which vLLM calls through one queue."""
    if not has_several(parallel):
        return ""
    if int(parallel.nnodes) > 1:
        return f"Updraft supports several ranks of vLLM only on one node, not on {parallel.nnodes}"
    if parallel.distributed_executor_backend != "mp":
        backend = parallel.distributed_executor_backend
        return f"several ranks require --distributed-executor-backend mp, but this server uses {backend}"
    return ""


def fixed_drafts(config: Any) -> str:
    """Why the number of draft tokens cannot change between steps; "" if it can. These are vLLM's own reasons."""
    speculative = config.speculative_config
    if speculative is None or speculative.method != "eagle3":
        return "this server does not draft with EAGLE-3"
    if config.parallel_config.data_parallel_size > 1:
        return "with data parallelism, drafting cannot be turned off"
    if config.compilation_config.cudagraph_mode.has_full_cudagraphs() and not config.use_v2_model_runner:
        return (
            "vLLM's first model runner records full CUDA graphs of steps with drafts, so drafting cannot be turned off: set"
            " VLLM_USE_V2_MODEL_RUNNER=1"
        )
    return ""


def facts(config: Any) -> dict[str, Any]:
    """The configuration for `updraft attach --check`."""
    speculative = config.speculative_config
    return {
        "model": str(config.model_config.model),
        "method": str(speculative.method) if speculative is not None else "",
        "steps": int(speculative.num_speculative_tokens or 0) if speculative is not None else 0,
        "ranks": ranks(config.parallel_config),
        "unsupported": unsupported(config),
        "device": str(config.device_config.device_type),
        "eager": bool(config.model_config.enforce_eager),
    }
