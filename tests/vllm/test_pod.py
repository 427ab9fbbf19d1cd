"""The containers that the operator makes for engine VLLM, run as processes with a real vLLM: their commands, variables and
probes. The port of clients speaks TLS with a certificate from a Secret, which is renewed under a running answer.

Only paths, ports and addresses are of this machine. Kubernetes itself is not here: the order of the containers, and who gets
which signal when, are the test's.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.certificates import MountedCertificate
from tests.support.manifests import CONFIG, container, one, speculator, templates
from tests.support.ports import free_port
from tests.support.processes import Process, process_group, reachable_ports, scrape, total
from tests.support.redis_server import RedisServer
from tests.support.registry import RegistryProcess
from tests.support.wait import wait_until
from tests.vllm import build
from tests.vllm.server import START_S, cpu_environment

from updraft_cli.local.folders import cache_folder
from updraft_cli.models.smollm2 import model_folder
from updraft_operator.manifests import serving

if not build.is_built():
    pytest.skip("stock vLLM is not installed; run `make vllm-build`", allow_module_level=True)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

KEY = "a-key-of-at-least-sixteen-characters"
GRACE_S = 300
_NOT_HERE = ("UPDRAFT_INFERENCE_REGISTRY_TOKEN_FILE",)
"""Variables of a registry that asks for a token; the test's does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """The pod's containers as processes: the server's port, its startup probe, and the agent."""

    http: httpx.Client
    port: int
    certificate: MountedCertificate
    startup_probe: list[str]
    server: "subprocess.Popen[bytes]"
    log: Path
    agent: Process
    metrics_port: int

    def is_healthy(self) -> bool:
        try:
            return self.http.get("/health").is_success
        except httpx.TransportError:
            return False

    def has_started(self) -> bool:
        return subprocess.run(self.startup_probe, check=False, capture_output=True).returncode == 0

    def ask(self, num_tokens: int, key: str = KEY) -> httpx.Response:
        return self.http.post("/v1/completions", json=_body(num_tokens), headers=_headers(key))

    def streamed(self, num_tokens: int) -> list[str]:
        """The events of an answer."""
        body = _body(num_tokens) | {"stream": True, "stream_options": {"include_usage": True}}
        with self.http.stream("POST", "/v1/completions", json=body, headers=_headers(KEY)) as answer:
            return [line.removeprefix("data: ") for line in answer.iter_lines() if line]

    def metric(self, name: str) -> float:
        return total(scrape(self.metrics_port), f"updraft_inference_{name}")


@pytest.fixture(scope="module")
def pod(redis_server: RedisServer) -> Iterator[Pod]:
    spec = {
        "engine": {"type": "VLLM", "args": ["--enforce-eager", "--dtype", "float32"]},
        "targetModel": {"servedName": "qwen"},
        "draft": {"vocabSize": 2048},
        "serving": {
            "maxContextTokens": 1024,
            "maxRunningRequests": 4,
            "terminationGracePeriodSeconds": GRACE_S,
            "apiKeysSecretRef": {"name": "clients"},
            "tlsSecretRef": {"name": "clients-tls"},
        },
    }
    objects = serving.objects(speculator(spec, uri=str(model_folder(cache_folder(os.environ)))), CONFIG)
    template = templates(objects)["qwen-serving"]["spec"]
    prepare, inference, engine = (container(template, name) for name in ("prepare", "inference", "engine"))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pod-")))  # Unix sockets have short names
        here = _Here(folder=folder, port=free_port(), metrics_port=free_port())
        (folder / "keys").write_text(f"{KEY}\n")
        certificate = MountedCertificate(folder / "serving-tls")
        registry = stack.enter_context(RegistryProcess(folder))
        data = one(objects, "ConfigMap", "qwen-serving")["data"]
        ours = {name: value for name, value in here.of(data).items() if name not in _NOT_HERE} | {
            "UPDRAFT_INFERENCE_REGISTRY_ADDRESS": registry.address,
            "UPDRAFT_INFERENCE_REDIS_URL": redis_server.url,
            "UPDRAFT_INFERENCE_POD_NAME": "pod-0",
            "UPDRAFT_INFERENCE_METRICS_PORT": str(here.metrics_port),
        }
        command = [sys.executable, "-m", "updraft_inference", *here.arguments(prepare["args"])]
        subprocess.run(command, env={**os.environ, **here.variables(prepare)}, check=True)
        agent = Process(
            "updraft_inference",
            here.variables(inference) | ours,
            folder / "agent.log",
            here.arguments(inference["args"]),
        )
        stack.enter_context(agent)
        log = folder / "vllm.log"
        started = [str(build.python()), *engine["command"][1:], *here.arguments(engine["args"])]
        server = stack.enter_context(
            process_group(started, log, environment={**cpu_environment(), **here.variables(engine)})
        )
        probe = [str(build.python()), *engine["startupProbe"]["exec"]["command"][1:-1], str(here.port)]
        url = f"https://127.0.0.1:{here.port}"
        http = stack.enter_context(httpx.Client(base_url=url, timeout=GRACE_S, verify=certificate.trusting))
        made = Pod(
            http=http,
            port=here.port,
            certificate=certificate,
            startup_probe=probe,
            server=server,
            log=log,
            agent=agent,
            metrics_port=here.metrics_port,
        )
        assert not made.has_started()
        wait_until(
            lambda: server.poll() is not None or made.is_healthy(), timeout_s=START_S, what="the server is healthy"
        )
        assert server.poll() is None, log.read_text()[-5000:]
        assert made.has_started()
        yield made


@dataclass(frozen=True, slots=True, kw_only=True)
class _Here:
    """Where the things of a pod are on this machine."""

    folder: Path
    port: int
    metrics_port: int

    def of(self, values: Mapping[str, str]) -> dict[str, str]:
        return {name: self._place(value) for name, value in values.items()}

    def variables(self, made: Mapping[str, Any]) -> dict[str, str]:
        """Those with a value: the test gives what Kubernetes would fill in."""
        return self.of({each["name"]: each["value"] for each in made["env"] if "value" in each})

    def arguments(self, arguments: list[str]) -> list[str]:
        ports = {"8000": str(self.port)}
        return [ports.get(each, self._place(each)) for each in arguments]

    def _place(self, text: str) -> str:
        if text == "/tmp":  # the server's home
            return str(self.folder)
        moved = text.replace("/var/lib/updraft", str(self.folder / "data"))
        moved = moved.replace("/etc/updraft/serving-tls", str(self.folder / "serving-tls" / "mount"))
        return moved.replace("/etc/updraft/api-keys", str(self.folder))


def _body(num_tokens: int) -> dict[str, Any]:
    return {"model": "qwen", "prompt": "Once upon a time", "max_tokens": num_tokens, "ignore_eos": True}


def _headers(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


@pytest.mark.attack(
    boundary="plugin",
    attack="reaching anything of a vLLM server of one rank but its port of clients",
    outcome="nothing else listens beyond the pod, except gloo, where the name of the pod is no loopback address",
)
@pytest.mark.attack(
    boundary="plugin",
    attack="plaintext to the clients' port of a real vLLM with TLS",
    outcome="nothing is answered",
)
def test_a_pod_of_vllm_serves_who_has_a_key_over_tls_learns_from_it_and_ends_in_order(pod: Pod) -> None:
    assert reachable_ports(pod.server.pid) == {pod.port}
    assert pod.is_healthy(), "the readiness probe"
    assert pod.http.get(f"http://127.0.0.1:{pod.metrics_port}/healthz").status_code == 200, "the agent's probe"
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{pod.port}/health")
    assert pod.ask(8, key="").status_code == 401
    assert pod.ask(8, key="another-key-of-sixteen-characters").status_code == 401
    answer = pod.ask(32)
    assert answer.status_code == 200, answer.text
    wait_until(lambda: pod.metric("captured_traces_total") >= 1, what="a trace of the request")
    assert pod.metric("verify_steps_total") == 0, "no step drafts with the initial draft"

    answers = list[list[str]]()
    before = pod.metric("output_tokens_total")
    client = threading.Thread(target=lambda: answers.append(pod.streamed(400)))
    client.start()
    wait_until(lambda: _running(pod) >= 1, what="the request runs")
    for _ in range(2):  # a server that watches the mounted file follows the first renewal only
        pod.certificate.renew()
        assert pod.certificate.is_shown_at(pod.port)
    assert _running(pod) >= 1, "the request still runs"
    pod.server.send_signal(signal.SIGTERM)
    client.join()
    *_, last, end = answers[0]
    assert end == "[DONE]", "a stream goes on over renewals, and a request that runs at the end of the pod is answered"
    assert json.loads(last)["usage"]["completion_tokens"] == 400
    pod.server.wait(GRACE_S)
    wait_until(lambda: pod.metric("output_tokens_total") >= before + 400, what="the agent counts the last request")
    assert pod.agent.terminate() == 0


def _running(pod: Pod) -> float:
    """Requests in vLLM's batch now."""
    lines = pod.http.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("vllm:num_requests_running"))
