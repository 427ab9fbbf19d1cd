"""The stock vLLM server of a pod: its arguments, and the settings of its agent."""

import json

from updraft_operator.api.speculator import AdaptiveSpeculator, EngineType
from updraft_operator.manifests.manifest import Images
from updraft_operator.manifests.model import ModelMount, served_name
from updraft_operator.manifests.servers import server
from updraft_operator.manifests.servers.server import Server

PORT = 8000


def describe(owner: AdaptiveSpeculator, images: Images, target: ModelMount) -> Server:
    """The server. `vllm serve` is the same module; vLLM's packages for CPUs have only the module."""
    spec, serving = owner.spec, owner.spec.serving
    context = [] if serving.max_context_tokens is None else ["--max-model-len", str(serving.max_context_tokens)]
    num_ranks = spec.engine.tensor_parallel_size
    ranks = [] if num_ranks == 1 else ["--tensor-parallel-size", str(num_ranks)]
    return Server(
        engine=EngineType.VLLM,
        image=images.vllm,
        port=PORT,
        health="/health",  # the HTTP process answers it alone, so swaps do not delay it
        command=("python3", "-m", "vllm.entrypoints.openai.api_server"),
        args=(
            *("--model", target.path, "--served-model-name", served_name(spec.target_model)),
            *("--host", "0.0.0.0", "--port", str(PORT)),  # noqa: S104 - of a pod, behind a NetworkPolicy
            *ranks,
            *("--max-num-seqs", str(serving.max_running_requests), *context),
            *("--speculative-config", json.dumps(speculation(spec.draft.lookahead))),
            *("--shutdown-timeout", str(_drain_s(serving.termination_grace_period_seconds))),
        ),
    )


def speculation(num_steps: int) -> dict[str, str | int]:
    """The value of `--speculative-config`. The plugin swaps only EAGLE-3 drafts."""
    return {"method": "eagle3", "model": server.INITIAL_DRAFT, "num_speculative_tokens": num_steps}


def _drain_s(grace_s: int) -> int:
    """How long running requests may continue after SIGTERM. By default, vLLM cuts them off at once."""
    return max(1, grace_s - server.PULL_S - server.FLUSH_S)
