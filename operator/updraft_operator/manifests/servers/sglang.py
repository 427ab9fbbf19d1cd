"""The stock SGLang server of a pod: its arguments, and the settings of its agent."""

from updraft_operator.api.speculator import AdaptiveSpeculator, Engine, EngineType
from updraft_operator.manifests import pod
from updraft_operator.manifests.manifest import Images
from updraft_operator.manifests.model import ModelMount, served_name
from updraft_operator.manifests.servers import server
from updraft_operator.manifests.servers.server import Server
from updraft_operator.manifests.tls import port

PORT = 30000

ADMIN_KEY = f"{pod.DATA['mountPath']}/server/sglang.yaml"


def describe(owner: AdaptiveSpeculator, images: Images, target: ModelMount) -> Server:
    """The server. On SIGTERM, it finishes all running requests, without a time limit."""
    spec, serving = owner.spec, owner.spec.serving
    context = [] if serving.max_context_tokens is None else ["--context-length", str(serving.max_context_tokens)]
    is_ours = not has_own_config(spec.engine)
    return Server(
        engine=EngineType.SGLANG,
        image=images.sglang,
        port=PORT,
        # /health generates a token and /ready is 503 while paused: probes on them would fail during a swap.
        health="/ping",
        command=("python3", "-m", "sglang.launch_server"),
        args=(
            *("--model-path", target.path, "--served-model-name", served_name(spec.target_model)),
            *("--host", "0.0.0.0", "--port", str(PORT)),  # noqa: S104 - of a pod, behind a NetworkPolicy
            *("--tp-size", str(spec.engine.tensor_parallel_size), *context),
            *("--max-running-requests", str(serving.max_running_requests)),
            *speculation(server.INITIAL_DRAFT, spec.draft.lookahead),
            *(("--config", ADMIN_KEY) if is_ours else ()),
        ),
        prepare_args=("--admin-key-file", ADMIN_KEY),
        agent_args=("--attach", f"{port.scheme(serving)}://127.0.0.1:{PORT}"),
        agent_variables={"UPDRAFT_INFERENCE_SGLANG_ADMIN_KEY_FILE": ADMIN_KEY} if is_ours else {},
    )


def speculation(seed: str, num_steps: int) -> list[str]:
    """The arguments that Updraft needs. A test checks that `updraft_inference.launch.sglang_arguments` has the same."""
    return [
        *("--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", seed),
        *("--speculative-num-steps", str(num_steps), "--speculative-eagle-topk", "1"),
        *("--speculative-num-draft-tokens", str(num_steps + 1)),
        *("--custom-weight-loader", "updraft_sglang.weights.load", "--enable-metrics"),
    ]


def has_own_config(engine: Engine) -> bool:
    """Whether the user's arguments have their own --config, because SGLang reads only one. Then the user must put an admin key
    into that file, and give it to the agent too."""
    return any(word.partition("=")[0] == "--config" for word in engine.args)
