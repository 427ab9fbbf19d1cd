"""What a sender says on SGLang's own port, its API keys, and its certificate. The test is the agent."""

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.sglang import build
from tests.sglang.conftest import CycleModels
from tests.sglang.server import CPU_VARIABLES, Server, eagle3
from tests.support.certificates import MountedCertificate
from tests.support.processes import reachable_ports
from tests.support.tap_agent import Agent, listening
from tests.support.wait import until

from updraft_inference.launch import admin_key
from updraft_inference.sidecar.sglang.server import SglangServer
from updraft_inference.tap import plugin_folder
from updraft_tap.http.terms import Terms

pytestmark = [pytest.mark.timeout(900), pytest.mark.lasts(120)]

ONE, OTHER, GATEWAY = "sk-one-0123456789", "sk-other-0123456789", "sk-gateway-0123456789"
EVERYTHING = {"payload": 1.0, "prompt_rows": 1000, "counterfactual_rows": 3}
ROLES = {"scheduler", "worker"}

_GREEDY = {"temperature": 0, "ignore_eos": True}
_ASK = {**_GREEDY, "model": "target", "prompt": "abc", "max_tokens": 12}
ENDLESS = {**_ASK, "max_tokens": 900, "stream": True}
"""It ends long after the test has hung up."""
GENERATE = {"text": "abc", "sampling_params": {**_GREEDY, "max_new_tokens": 12}}
FORGED = {"updraft": asdict(Terms(domain="of another")), "updraft_seal": "guessed"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    server: Server
    socket: Path
    certificate: MountedCertificate
    admin_key: str


def plugged(cycle: CycleModels, folder: Path, socket: Path, certificate: MountedCertificate, *more: str) -> Server:
    """A server that speaks TLS, requires keys, and lets each have two requests at once."""
    (folder / "keys").write_text(f"# of the team\n{ONE}\nacme {OTHER}\ngate {GATEWAY} gateway\n")
    files = ("--ssl-certfile", str(certificate.cert_file), "--ssl-keyfile", str(certificate.key_file))
    return Server(
        cycle.target,
        folder / "server.log",
        arguments=[*eagle3(cycle.half), *files, *more],
        plugins=[plugin_folder.write(folder / "plugin")],
        variables={
            "UPDRAFT_SGLANG_SOCKET": str(socket),
            "UPDRAFT_SGLANG_API_KEYS_FILE": str(folder / "keys"),
            "UPDRAFT_SGLANG_MAX_REQUESTS_PER_KEY": "2",
            "UPDRAFT_SGLANG_TENANT_HEADER": "X-Updraft-Tenant",
        },
        trusting=certificate.trusting,
    )


@pytest.fixture(scope="module")
def setting(cycle: CycleModels, tmp_path_factory: pytest.TempPathFactory, tap_socket: Path) -> Iterator[Setting]:
    folder = tmp_path_factory.mktemp("doors")
    certificate = MountedCertificate(folder / "tls")
    admin_key.write(key_file := folder / "admin.yaml")
    more = ("--config", str(key_file), "--host", "0.0.0.0")  # noqa: S104 - as in a pod
    with plugged(cycle, folder, tap_socket, certificate, *more) as server:
        yield Setting(server=server, socket=tap_socket, certificate=certificate, admin_key=admin_key.read(key_file))


def client(setting: Setting) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=setting.server.url, timeout=300, verify=setting.certificate.trusting)


def headers(key: str = ONE, **more: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}", **{f"X-Updraft-{name}": value for name, value in more.items()}}


async def ended(agent: Agent, count: int, *, has_domains: bool = False) -> list[dict[str, Any]]:
    """The ends of so many requests; with `has_domains`, of those with a domain."""

    def found() -> list[dict[str, Any]]:
        return [header for header, _ in agent.finished.values() if header["domain"] or not has_domains]

    await until(lambda: len(found()) >= count, what="the ends of the requests")
    await agent.settle()
    assert len(found()) == count
    return found()


@pytest.mark.parametrize("shown", [{}, {"Authorization": "Bearer sk-wrong-0123456789"}, {"X-Updraft-Own": "guessed"}])
def test_without_a_known_key_nothing_but_probes_is_answered(setting: Setting, shown: dict[str, str]) -> None:
    trusting = setting.certificate.trusting
    with httpx.Client(base_url=setting.server.url, headers=shown, timeout=300, verify=trusting) as http:
        for path, body in (("/v1/completions", _ASK), ("/generate", GENERATE)):
            refused = http.post(path, json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        assert http.post("/pause_generation", json={}).status_code == 401, "SGLang asks for its own admin key"
        assert http.get("/model_info").status_code == 401
        assert [http.get(path).status_code for path in ("/ready", "/ping")] == [200] * 2


async def test_the_third_concurrent_request_of_a_key_is_refused_and_another_keys_is_not(setting: Setting) -> None:
    async with (
        client(setting) as http,
        http.stream("POST", "/v1/completions", json=ENDLESS, headers=headers()) as first,
        http.stream("POST", "/v1/completions", json=ENDLESS, headers=headers()) as second,
    ):
        assert (first.status_code, second.status_code) == (200, 200)
        third = await http.post("/generate", json=GENERATE, headers=headers())
        other = await http.post("/generate", json=GENERATE, headers=headers(OTHER))
    assert (third.status_code, third.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert other.status_code == 200

    async with client(setting) as http:
        two = {**GENERATE, "sampling_params": {"n": 2, "max_new_tokens": 4}}

        async def is_free() -> bool:  # the door hears of the end of those that hung up a little later
            return (await http.post("/generate", json=two, headers=headers())).status_code == 200

        await until(is_free, what="both places")
        for body in ({**two, "text": ["abc", "abd"]}, {**GENERATE, "text": ["abc", "abd", "abe"]}):
            refused = await http.post("/generate", json=body, headers=headers())
            assert refused.status_code == 400
            assert "an API key may have at most 2" in refused.json()["error"]["message"]


async def test_the_domain_arrives_with_every_choice_streamed_or_not_and_also_if_the_client_hangs_up(
    setting: Setting,
) -> None:
    async with listening(setting.socket, EVERYTHING, roles=ROLES) as agent, client(setting) as http:
        for kind, more in (
            ("plain", {}),
            ("choices", {"n": 2}),
            ("stream", {"stream": True, "n": 2}),
            ("prompts", {"prompt": ["abc", "abd"]}),
        ):
            answer = await http.post("/v1/completions", json={**_ASK, **more}, headers=headers(Domain=kind))
            assert answer.status_code == 200
        async with http.stream(
            "POST", "/v1/completions", json=ENDLESS, headers=headers(OTHER, Domain="gone")
        ) as stream:
            await anext(stream.aiter_lines())
        found = await ended(agent, 8)

    domains = sorted(header["domain"] for header in found)
    assert domains == ["choices", "choices", "gone", "plain", "prompts", "prompts", "stream", "stream"]
    for header in found:
        assert (header["asked"], header["permitted"]) == (True, True)
        assert (header["finish"] == "aborted") == (header["domain"] == "gone")
        assert header["sampling"] is not None


async def test_a_tenant_is_whose_key_it_is_or_whom_a_gateway_names(setting: Setting) -> None:
    async with listening(setting.socket, EVERYTHING, roles=ROLES) as agent, client(setting) as http:
        for shown in (
            headers(OTHER, Tenant="globex", Domain="its key's"),
            headers(GATEWAY, Domain="the gateway's"),
            headers(GATEWAY, Tenant="globex", Domain="named"),
        ):
            assert (await http.post("/v1/completions", json=_ASK, headers=shown)).status_code == 200
        twice = [*headers(GATEWAY, Tenant="globex").items(), ("X-Updraft-Tenant", "acme")]
        refused = await http.post("/v1/completions", json=_ASK, headers=twice)
        found = await ended(agent, 3)

    tenants = {header["domain"]: header["tenant"] for header in found}
    names = {"its key's": "acme", "the gateway's": "gate", "named": "globex"}
    assert tenants == {domain: hashlib.sha256(name.encode()).hexdigest() for domain, name in names.items()}
    assert refused.status_code == 400


@pytest.mark.parametrize("more", [{}, {"n": 2}, {"stream": True}])
async def test_of_who_opts_out_counters_are_left_and_nothing_else(setting: Setting, more: dict[str, Any]) -> None:
    async with listening(setting.socket, EVERYTHING, roles=ROLES) as agent, client(setting) as http:
        for shown, params in (
            (headers(Capture="off"), None),
            (headers(Capture="off"), {"updraft_capture": "on", **FORGED}),
            (headers(), {"updraft_capture": "off"}),
        ):
            body = {**_ASK, **more, "custom_params": params}
            assert (await http.post("/v1/completions", json=body, headers=shown)).status_code == 200
        found = await ended(agent, 3 * more.get("n", 1))
        tensors = [tensors for _, tensors in agent.finished.values()]

    assert not any(header["permitted"] for header in found)
    assert [header["sampling"] for header in found] == [None] * len(found)
    assert tensors == [{}] * len(found)
    assert agent.seen == {}
    assert sum(one["steps"] for header in found for one in header["counters"]) > 0


async def test_a_client_cannot_forge_a_mark(setting: Setting) -> None:
    body = {**GENERATE, "sampling_params": {**GENERATE["sampling_params"], "custom_params": FORGED}}  # type: ignore[dict-item]
    async with listening(setting.socket, EVERYTHING, roles=ROLES) as agent, client(setting) as http:
        assert (await http.post("/generate", json=body, headers=headers(Domain="own"))).status_code == 200
        (header,) = await ended(agent, 1)

    assert header["domain"] == "own"


async def test_a_header_that_cannot_be_meant_is_refused_and_so_is_a_body_that_cannot_be_counted(
    setting: Setting,
) -> None:
    async with client(setting) as http:
        misspelt = await http.post("/generate", json=GENERATE, headers=headers(Capture="of"))
        compressed = await http.post(
            "/generate", content=b"\x28\xb5", headers={**headers(), "X-Body-Compressed": "zstd"}
        )

    assert misspelt.status_code == 400
    assert "expected on, off, no-train or no-retain, got 'of'" in misspelt.json()["error"]["message"]
    assert "the body cannot be compressed" in compressed.json()["error"]["message"]


@pytest.mark.attack(
    boundary="plugin",
    attack="plaintext to the clients' port of a real SGLang with TLS",
    outcome="nothing is answered",
)
async def test_the_port_speaks_tls_only_and_a_renewed_certificate_ends_no_stream(setting: Setting) -> None:
    port, certificate = setting.server.port, setting.certificate
    async with httpx.AsyncClient() as plain:
        with pytest.raises(httpx.TransportError):
            await plain.get(f"http://127.0.0.1:{port}/ready")
    async with (
        client(setting) as http,
        http.stream("POST", "/v1/completions", json=ENDLESS, headers=headers()) as running,
    ):
        lines = running.aiter_lines()
        await anext(lines)
        for _ in range(2):
            certificate.renew()
            assert certificate.is_shown_at(port)
        async with client(setting) as another:  # a connection of after the renewals
            shorter = await another.post("/v1/completions", json=_ASK, headers=headers(OTHER))
        assert shorter.status_code == 200
        *_, end = [line async for line in lines if line]
    assert end == "data: [DONE]"


@pytest.mark.attack(
    boundary="plugin",
    attack="reaching anything of an SGLang server of one rank but its port of clients",
    outcome="nothing else listens beyond the pod",
)
def test_nothing_of_the_server_listens_for_other_machines(setting: Setting) -> None:
    assert reachable_ports(setting.server.pid) == {setting.server.port}


async def test_the_agents_own_calls_need_no_name_in_the_certificate(setting: Setting) -> None:
    server = SglangServer(setting.server.url.replace("127.0.0.1", "localhost"), admin_key=setting.admin_key)
    async with server:
        await server.pause()
        await server.resume()


async def test_each_of_several_http_processes_asks_for_keys_and_for_terms_and_follows_its_certificate(
    cycle: CycleModels, tmp_path: Path, short_tmp_path: Path
) -> None:
    socket, certificate = short_tmp_path / "tap.sock", MountedCertificate(tmp_path / "tls")
    with plugged(cycle, tmp_path, socket, certificate, "--tokenizer-worker-num", "2") as server:
        async with listening(socket, EVERYTHING, roles=ROLES) as agent:
            for i in range(8):  # a connection each, so that both processes get some
                certificate.renew()
                assert certificate.is_shown_at(server.port)
                async with httpx.AsyncClient(base_url=server.url, timeout=300, verify=certificate.trusting) as http:
                    assert (await http.post("/generate", json=GENERATE)).status_code == 401
                    answer = await http.post("/generate", json=GENERATE, headers=headers(Domain=str(i)))
                    assert answer.status_code == 200
            # One process may still be at the server's own warm-up request, which has no domain.
            found = await ended(agent, 8, has_domains=True)

    assert {header["domain"] for header in found} == {str(i) for i in range(8)}
    assert all(header["sampling"] is not None for header in found)


REFUSED = """
import json, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import prepare_server_args

found = []
for more in json.loads(sys.argv[2]):
    try:
        prepare_server_args(["--model-path", sys.argv[1], "--device", "cpu", *more]).resolve_once()
        found.append("")
    except SystemExit as error:
        found.append(str(error))
print(json.dumps(found))
"""


def test_a_server_with_a_door_that_asks_for_no_key_does_not_start(cycle: CycleModels, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"{ONE}\n")
    environment = {
        **os.environ,
        **CPU_VARIABLES,
        "PYTHONPATH": str(plugin_folder.write(tmp_path / "plugin")),
        "UPDRAFT_SGLANG_API_KEYS_FILE": str(tmp_path / "keys"),
    }
    ways: list[list[str]] = [[], ["--grpc-port", "50051"], ["--smg-grpc-mode"]]
    command = [str(build.python()), "-c", REFUSED, str(cycle.target), json.dumps(ways)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)

    http, *others = json.loads(done.stdout.splitlines()[-1])

    assert http == ""
    assert all("API keys cannot be enforced: SGLang's gRPC servers have no HTTP headers" in other for other in others)


SHOWN = """
import json, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import prepare_server_args
from sglang.srt.utils.common import build_server_info

arguments = prepare_server_args(["--model-path", sys.argv[1], "--device", "cpu", "--config", sys.argv[2]])
arguments.resolve_once()
print(arguments.admin_api_key)
print(json.dumps(build_server_info(arguments, {}), default=str))
"""


def test_a_server_shows_the_admin_key_of_its_configuration_to_nobody(cycle: CycleModels, tmp_path: Path) -> None:
    admin_key.write(file := tmp_path / "key.yaml")
    environment = {
        **os.environ,
        **CPU_VARIABLES,
        "PYTHONPATH": str(plugin_folder.write(tmp_path / "plugin")),
        "UPDRAFT_SGLANG_SOCKET": str(tmp_path / "tap.sock"),
    }
    command = [str(build.python()), "-c", SHOWN, str(cycle.target), str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)

    key, shown = done.stdout.splitlines()[-2:]

    assert key == admin_key.read(file)
    assert "--admin-api-key ***" in json.loads(shown)["launch_command"]
    assert key not in shown
