"""TLS of the clients' port from a Secret: the volume, the servers' own options, and what follows: Service, probes, status."""

import ssl
import subprocess
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.support.certificates import Authority
from tests.support.manifests import CONFIG, built, container, named, one, pod_spec, speculator

from updraft_operator.api.speculator import AdaptiveSpeculator
from updraft_operator.manifests import serving
from updraft_operator.manifests.manifest import Manifest
from updraft_operator.watching.secrets import named as named_secrets

TLS = {"tlsSecretRef": {"name": "certificate"}}
FOLDER = "/etc/updraft/serving-tls"
SERVERS = ("SGLang", "VLLM")
each_engine = pytest.mark.parametrize("engine", ["Torch", *SERVERS])


def _owner(engine: str, args: Sequence[str] = (), **more: Any) -> AdaptiveSpeculator:
    chosen = {"type": engine, **({"args": list(args)} if args else {})}
    return speculator({"engine": chosen, "serving": {**TLS, **more}})


def _objects(engine: str) -> list[Manifest]:
    return serving.objects(_owner(engine), CONFIG)


def _server(engine: str, args: Sequence[str] = (), **more: Any) -> Manifest:
    pod = pod_spec(_owner(engine, args, **more), "serving")
    return container(pod, "inference" if engine == "Torch" else "engine")


@each_engine
def test_the_certificate_is_mounted_where_the_server_reads_it(engine: str) -> None:
    pod = pod_spec(_owner(engine), "serving")
    secret = named(pod["volumes"])["serving-tls"]["secret"]
    assert secret["secretName"] == "certificate"
    assert [item["path"] for item in secret["items"]] == ["tls.crt", "tls.key"]
    assert {"name": "serving-tls", "mountPath": FOLDER, "readOnly": True} in _server(engine)["volumeMounts"]


def test_engine_torch_has_its_settings() -> None:
    data = one(_objects("Torch"), "ConfigMap", "qwen-serving")["data"]
    assert data["UPDRAFT_INFERENCE_TLS_CERT_FILE"] == f"{FOLDER}/tls.crt"
    assert data["UPDRAFT_INFERENCE_TLS_KEY_FILE"] == f"{FOLDER}/tls.key"


@pytest.mark.parametrize("engine", SERVERS)
def test_servers_have_their_own_options_before_those_of_the_spec(engine: str) -> None:
    words = _server(engine, ["--x"])["args"]
    own = ["--ssl-certfile", f"{FOLDER}/tls.crt", "--ssl-keyfile", f"{FOLDER}/tls.key", "--x"]
    assert words[-len(own) :] == own
    assert "TLS" not in str(one(_objects(engine), "ConfigMap", "qwen-serving")["data"]), "the agent has another port"


def test_the_agent_of_sglang_calls_its_server_so() -> None:
    agent = container(pod_spec(_owner("SGLang"), "serving"), "inference")
    assert "https://127.0.0.1:30000" in agent["args"]


@each_engine
def test_service_probes_and_the_name_of_the_port_follow(engine: str) -> None:
    (port,) = one(_objects(engine), "Service", "qwen")["spec"]["ports"]
    made = _server(engine)
    assert (port["name"], port["port"], port["targetPort"]) == ("https", 443, "https")
    assert [each["name"] for each in made["ports"]] == ["https"]
    probes = [made[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")]
    assert {(probe["port"], probe["scheme"]) for probe in probes} == {("https", "HTTPS")}


@each_engine
def test_without_a_certificate_nothing_of_it_is_there(engine: str) -> None:
    objects = str(built(speculator({"engine": {"type": engine}})))
    assert not any(word in objects for word in ("serving-tls", "'HTTPS'", "--ssl"))


def test_a_missing_secret_is_told() -> None:
    assert ("certificate", "tls.crt") in list(named_secrets(speculator({"serving": TLS})))


@pytest.mark.parametrize(("status", "is_started"), [(401, True), (200, False)])
def test_the_probe_of_keys_speaks_tls(status: int, is_started: bool, tmp_path: Path) -> None:  # noqa: FBT001
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 - the standard library's name
            """Keep quiet."""

    made = Authority(tmp_path).server()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.cert_file, made.key_file)
    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        *command, _ = _server("VLLM", apiKeysSecretRef={"name": "clients"})["startupProbe"]["exec"]["command"]
        words = [sys.executable, *command[1:], str(server.server_port)]
        probed = subprocess.run(words, capture_output=True, text=True, check=False)
        server.shutdown()
    assert (probed.returncode == 0) is is_started, probed.stderr
