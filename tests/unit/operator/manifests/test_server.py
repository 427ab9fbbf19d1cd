"""Pods of a stock server: what clients reach, what the agent beside it may cost, and what the server must not do without."""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support.manifests import container, named, pod_spec, speculator
from tests.support.ports import free_port

from updraft_operator.api.speculator import AdaptiveSpeculator

KEYS = {"apiKeysSecretRef": {"name": "clients", "key": "list"}, "maxRequestsPerKey": 4}
each_server = pytest.mark.parametrize("engine", ["SGLang", "VLLM"])


def _pod(engine: str, **serving: Any) -> dict[str, Any]:
    return pod_spec(speculator({"engine": {"type": engine}, "serving": serving}, uri="hf://org/qwen"), "serving")


def _argument(made: dict[str, Any], name: str) -> str:
    return str(made["args"][made["args"].index(name) + 1])


def _variables(made: dict[str, Any]) -> dict[str, Any]:
    return {variable["name"]: variable.get("value") for variable in made["env"]}


@each_server
def test_the_server_is_stock_and_the_only_container_beside_its_agent(engine: str) -> None:
    spec = {"engine": {"type": engine, "args": ["--enable-x"], "image": "mine:2"}}
    pod = pod_spec(speculator(spec, uri="hf://org/qwen"), "serving")
    (server,) = pod["containers"]
    assert (server["image"], container(pod, "inference")["image"]) == ("mine:2", "inference:1")
    assert container(_pod(engine), "engine")["image"] == f"{engine.lower()}:1"
    assert _argument(server, "--served-model-name") == "qwen"
    assert server["args"][-1] == "--enable-x"
    assert [each["name"] for each in pod["initContainers"]] == ["model", "prepare", "inference"]
    assert named(pod["volumes"])["shm"]["emptyDir"] == {"medium": "Memory"}


@each_server
def test_an_agent_that_is_not_ready_takes_no_server_out_of_the_service(engine: str) -> None:
    """Kubernetes counts a readiness probe of a sidecar for the pod, and waits for its startup probe."""
    agent = container(_pod(engine), "inference")
    assert agent["restartPolicy"] == "Always"
    assert [name for name in agent if name.endswith("Probe")] == ["livenessProbe"]
    assert [port["name"] for port in agent["ports"]] == ["metrics"]


@each_server
def test_the_agent_may_use_more_memory_than_it_asks_for(engine: str) -> None:
    resources = container(_pod(engine), "inference")["resources"]
    assert resources.keys() == {"requests"}
    assert 1 << 30 < int(resources["requests"]["memory"].removesuffix("Mi")) << 20 < 4 << 30


@each_server
def test_a_pod_template_changes_the_agent_among_the_init_containers(engine: str) -> None:
    theirs = {"name": "inference", "env": [{"name": "UPDRAFT_INFERENCE_LOG_LEVEL", "value": "DEBUG"}]}
    pod = _pod(engine, podTemplate={"spec": {"initContainers": [theirs]}})
    assert _variables(container(pod, "inference"))["UPDRAFT_INFERENCE_LOG_LEVEL"] == "DEBUG"
    assert container(pod, "inference")["restartPolicy"] == "Always"


@each_server
def test_resources_and_variables_of_the_spec_are_the_servers(engine: str) -> None:
    resources = {"limits": {"nvidia.com/gpu": 1}}
    pod = _pod(engine, resources=resources, env=[{"name": "NCCL_DEBUG", "value": "INFO"}])
    assert container(pod, "engine")["resources"] == resources
    assert _variables(container(pod, "engine"))["NCCL_DEBUG"] == "INFO"
    assert "NCCL_DEBUG" not in _variables(container(pod, "inference"))


@each_server
def test_a_python_path_of_the_users_own_keeps_the_plugin(engine: str) -> None:
    plain = _variables(container(_pod(engine), "engine"))["PYTHONPATH"]
    pod = _pod(engine, env=[{"name": "PYTHONPATH", "value": "/mine"}, {"name": "A", "value": "1"}])
    variables = _variables(container(pod, "engine"))
    assert (variables["PYTHONPATH"], variables["A"]) == (f"{plain}:/mine", "1")


@pytest.mark.parametrize(("engine", "option"), [("SGLang", "--context-length"), ("VLLM", "--max-model-len")])
def test_the_server_itself_limits_the_context_if_the_spec_does(engine: str, option: str) -> None:
    assert _argument(container(_pod(engine, maxContextTokens=8192), "engine"), option) == "8192"
    assert option not in container(_pod(engine), "engine")["args"]


@each_server
def test_no_probe_of_a_server_waits_for_a_step(engine: str) -> None:
    """A step does not begin while a draft is swapped, so such a probe would fail then."""
    server = container(_pod(engine), "engine")
    path = {"SGLang": "/ping", "VLLM": "/health"}[engine]
    assert {name: server[name]["httpGet"]["path"] for name in server if name.endswith("Probe")} == dict.fromkeys(
        ("startupProbe", "readinessProbe", "livenessProbe"), path
    )


@pytest.mark.parametrize("grace_s", [10, 15, 60, 3600])
def test_requests_of_vllm_end_and_traces_are_flushed_before_the_pod_is_killed(grace_s: int) -> None:
    server = container(_pod("VLLM", terminationGracePeriodSeconds=grace_s), "engine")
    pull_s, drain_s = server["lifecycle"]["preStop"]["sleep"]["seconds"], int(_argument(server, "--shutdown-timeout"))
    assert pull_s + drain_s < grace_s
    assert drain_s == 1 or grace_s - pull_s - drain_s >= 8


def test_vllm_drafts_with_the_draft_that_was_prepared() -> None:
    owner = speculator({"engine": {"type": "VLLM"}, "draft": {"lookahead": 5}, "serving": {"maxRunningRequests": 7}})
    server = container(pod_spec(owner, "serving"), "engine")
    speculation = json.loads(_argument(server, "--speculative-config"))
    assert (speculation["method"], speculation["num_speculative_tokens"]) == ("eagle3", 5)
    assert speculation["model"] == _argument(container(pod_spec(owner, "serving"), "prepare"), "--seed")
    assert _argument(server, "--max-num-seqs") == "7"


@pytest.mark.parametrize(("engine", "option"), [("SGLang", "--tp-size"), ("VLLM", "--tensor-parallel-size")])
def test_a_server_has_the_gpus_of_the_spec(engine: str, option: str) -> None:
    pod = pod_spec(speculator({"engine": {"type": engine, "tensorParallelSize": 4}}), "serving")
    assert _argument(container(pod, "engine"), option) == "4"


@each_server
def test_the_header_of_a_tenant_reaches_the_server_also_without_keys(engine: str) -> None:
    pod, before = _pod(engine, tenantHeader="X-Team"), _pod(engine)
    variables = _variables(container(pod, "engine"))
    assert variables[f"UPDRAFT_{engine.upper()}_TENANT_HEADER"] == "X-Team"
    assert container(pod, "inference") == container(before, "inference")


@each_server
def test_api_keys_reach_the_server_and_not_the_agent(engine: str) -> None:
    pod, before = _pod(engine, **KEYS), _pod(engine)
    variables = _variables(container(pod, "engine"))
    assert variables[f"UPDRAFT_{engine.upper()}_API_KEYS_FILE"] == "/etc/updraft/api-keys/keys"
    assert variables[f"UPDRAFT_{engine.upper()}_MAX_REQUESTS_PER_KEY"] == "4"
    secret = named(pod["volumes"])["api-keys"]["secret"]
    assert (secret["secretName"], secret["items"]) == ("clients", [{"key": "list", "path": "keys"}])
    assert "optional" not in secret, "a pod without the Secret must not start"
    assert container(pod, "inference") == container(before, "inference")


@contextmanager
def _answering(status: int) -> Iterator[int]:
    """A server that answers every request so; its port."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 - the standard library's name
            """Keep quiet."""

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _probed(engine: str, port: int) -> "subprocess.CompletedProcess[str]":
    """What the startup probe of a server with API keys does at another port."""
    *command, _ = container(_pod(engine, **KEYS), "engine")["startupProbe"]["exec"]["command"]
    assert command[0] == "python3"
    return subprocess.run([sys.executable, *command[1:], str(port)], capture_output=True, text=True, check=False)


@each_server
def test_a_server_that_requires_keys_has_started(engine: str) -> None:
    server = container(_pod(engine, **KEYS), "engine")
    assert server["startupProbe"]["exec"]["command"][-1] == str(server["ports"][0]["containerPort"])
    with _answering(401) as port:
        assert _probed(engine, port).returncode == 0


@pytest.mark.attack(
    boundary="plugin",
    attack="an image whose server does not check keys",
    outcome="the pod never becomes ready, and says why",
)
@pytest.mark.parametrize("status", [200, 403, 404, 503])
def test_a_server_that_does_not_ask_for_a_key_never_starts_and_says_why(status: int) -> None:
    with _answering(status) as port:
        probed = _probed("VLLM", port)
    assert probed.returncode == 1
    assert f"a request without an API key got status {status}, expected 401" in probed.stderr


def test_a_server_that_still_loads_has_not_started() -> None:
    probed = _probed("VLLM", free_port())
    assert probed.returncode == 1
    assert "the server does not answer yet" in probed.stderr


@pytest.mark.parametrize("engine", ["Torch", "SGLang", "VLLM"])
def test_the_page_about_api_keys_shows_what_the_operator_takes(engine: str) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", Path("docs/openai.md").read_text(), re.DOTALL)
    owner = speculator({"engine": {"type": engine}, **yaml.safe_load(example)["spec"]})
    assert owner.spec.serving.api_keys_secret_ref is not None
    assert "api-keys" in named(pod_spec(owner, "serving")["volumes"])


@pytest.mark.parametrize(
    ("engine", "option", "context"), [("sglang", "--context-length", "32768"), ("vllm", "--max-model-len", "32768")]
)
def test_the_example_is_the_one_of_the_page_and_gives_the_server_a_gpu(engine: str, option: str, context: str) -> None:
    example = Path(f"examples/{engine}-8b.yaml").read_text()
    assert f"```yaml\n{example}```\n" in Path(f"docs/{engine}.md").read_text()
    shown = yaml.safe_load(example)
    AdaptiveSpeculator.model_validate(shown)
    owner = speculator(shown["spec"], uri=shown["spec"]["targetModel"]["uri"])
    server = container(pod_spec(owner, "serving"), "engine")
    assert server["resources"] == {kind: {"nvidia.com/gpu": "1"} for kind in ("requests", "limits")}
    assert _argument(server, option) == context
    assert container(pod_spec(owner, "trainer"), "trainer")["resources"]["requests"]["memory"] == "20Gi"
