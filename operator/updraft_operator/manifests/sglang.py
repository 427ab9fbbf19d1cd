"""A stock SGLang server in an inference pod: the container that prepares its files, and the server.

It shares one volume with the agent container, at the same path: the plugin's folder, the initial draft, the versions that it
loads by path, and the socket between the two.
"""

from collections.abc import Mapping
from typing import Any

from updraft_operator.api.speculator import AdaptiveSpeculator, Serving
from updraft_operator.manifests import pod
from updraft_operator.manifests.manifest import OperatorConfig
from updraft_operator.manifests.model import ModelMount, served_name

PORT = 30000

_FOLDER = pod.DATA["mountPath"]
_PLUGIN, _SEED, _ADMIN_KEY = (f"{_FOLDER}/sglang/{name}" for name in ("plugin", "seed", "server.yaml"))

_PREPARE, _DRAFT_CONFIG = "prepare", "UPDRAFT_INFERENCE_DRAFT_CONFIG"

_MARGIN = 8
"""Context tokens that the server reserves, in addition to those for drafts."""


def speculation(seed: str, num_steps: int) -> list[str]:
    """The arguments that Updraft needs. A test checks that updraft_inference's `arguments.speculation` has the same."""
    return [
        *("--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", seed),
        *("--speculative-num-steps", str(num_steps), "--speculative-eagle-topk", "1"),
        *("--speculative-num-draft-tokens", str(num_steps + 1)),
        *("--custom-weight-loader", "updraft_sglang.weights.load", "--enable-metrics"),
    ]


def draft_config_of(pod_spec: Mapping[str, Any]) -> str:
    """The `draft_config` that `prepare` was given in this pod template."""
    variables = [
        variable
        for container in pod_spec.get("initContainers", ())
        if container["name"] == _PREPARE
        for variable in container.get("env", ())
        if variable["name"] == _DRAFT_CONFIG
    ]
    return str(variables[0].get("value", "")) if variables else ""


def prepare(owner: AdaptiveSpeculator, config: OperatorConfig, target: ModelMount, draft_config: str) -> dict[str, Any]:
    """The init container that writes the plugin's folder and the initial draft; existing files are kept.

    That draft has the sizes of the published one with this config.json, or (empty) those of the spec.
    """
    return pod.container(
        _PREPARE,
        config.images.inference,
        config.images,
        Serving(),
        args=[
            *("prepare-sglang", "--plugin-dir", _PLUGIN, "--seed", _SEED),
            *("--admin-key-file", _ADMIN_KEY),
        ],
        env=[
            {"name": "UPDRAFT_INFERENCE_MODEL", "value": target.path},
            *({"name": name, "value": value} for name, value in pod.draft_sizes(owner, "UPDRAFT_INFERENCE").items()),
            *([{"name": _DRAFT_CONFIG, "value": draft_config}] if draft_config else []),
        ],
        volumeMounts=[pod.DATA, *target.mounts],
    )


def engine(
    owner: AdaptiveSpeculator,
    config: OperatorConfig,
    target: ModelMount,
    *,
    load_s: int,
    stop_s: int,
) -> dict[str, Any]:
    """The server. It may take `load_s` seconds to answer, and gets its SIGTERM `stop_s` seconds after the pod's deletion."""
    serving, spec = owner.spec.serving, owner.spec
    num_steps = spec.draft.lookahead
    container = pod.container(
        "engine",
        serving.image or config.images.sglang,
        config.images,
        serving,
        command=["python3", "-m", "sglang.launch_server"],
        args=[
            *("--model-path", target.path, "--served-model-name", served_name(spec.target_model)),
            *("--host", "0.0.0.0", "--port", str(PORT)),  # noqa: S104 - of a pod, behind a NetworkPolicy
            *("--tp-size", str(serving.tensor_parallel_size)),
            *_context(serving.max_context_tokens, num_steps),
            *("--max-running-requests", str(serving.max_running_requests), "--incremental-streaming-output"),
            *speculation(_SEED, num_steps),
            *([] if has_own_config(serving) else ["--config", _ADMIN_KEY]),
            *serving.args,
        ],
        ports=[{"name": "engine", "containerPort": PORT}],
        env=[
            {"name": "PYTHONPATH", "value": _PLUGIN},
            {"name": "UPDRAFT_SGLANG_SOCKET", "value": f"{_FOLDER}/sglang.sock"},
            # The reserve for drafts may exceed the model's positions; requests cannot, because the agent checks them.
            {"name": "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN", "value": "1"},
            {"name": "HOME", "value": "/tmp"},  # noqa: S108 - of the container: kernels are compiled into caches below it
        ],
        volumeMounts=[pod.DATA, pod.SHM_MOUNT, *target.mounts],
        # /health generates a token and waits while paused: a liveness probe on it would kill a pod during a swap.
        startupProbe=pod.http_probe("/ping", "engine", period_s=10, failures=load_s // 10),
        livenessProbe=pod.http_probe("/ping", "engine", period_s=10, failures=6),
        # SGLang exits as soon as it is idle, so its SIGTERM must come after the agent's last request.
        lifecycle={"preStop": {"sleep": {"seconds": stop_s}}},
    )
    container["securityContext"] = {**container["securityContext"], "readOnlyRootFilesystem": False}
    return container


def _context(max_tokens: int | None, num_steps: int) -> list[str]:
    """A context for requests of `max_tokens`; None: the model's own, which is the server's default."""
    return [] if max_tokens is None else ["--context-length", str(max_tokens + num_steps + 1 + _MARGIN)]


def has_own_config(serving: Serving) -> bool:
    """SGLang reads only one --config: a user with their own must pass its admin-api-key to the agent."""
    return "--config" in serving.args


def admin_key_variables(serving: Serving) -> list[dict[str, Any]]:
    if has_own_config(serving):
        return []
    return [{"name": "UPDRAFT_INFERENCE_SGLANG_ADMIN_KEY_FILE", "value": _ADMIN_KEY}]
