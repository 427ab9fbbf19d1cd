"""TLS of a dedicated Redis through the real reconciler: its certificate, the addresses of its users, and what waits for it."""

import base64
from dataclasses import replace
from urllib.parse import parse_qsl, urlsplit

import pytest
from tests.support.manifests import CONFIG
from tests.unit.operator.test_moves import MODES, SERVER, controllers, lives
from tests.unit.operator.world import KEY, OWNER, World, run_now

from updraft_operator.manifests.manifest import OperatorConfig
from updraft_operator.manifests.tls.objects import is_ready
from updraft_operator.manifests.tls.terms import Issuer, Lives, Tls, TlsMode
from updraft_operator.watching.x509 import read_certificate

LIVES = Lives(ca_s=400_000.0, certificate_s=100_000.0)
SELF_SIGNED = replace(CONFIG, tls=Tls(mode=TlsMode.SELF_SIGNED, lives=LIVES))
CERT_MANAGER = replace(CONFIG, tls=Tls(mode=TlsMode.CERT_MANAGER, issuer=Issuer(name="corporate"), lives=LIVES))
SECRET = ("Secret", KEY.namespace, "qwen-redis-tls")
HOST = "qwen-redis.team.svc"
PARTS = ("registry", "redis")


def entries(world: World, name: str) -> dict[str, str]:
    data = world.cluster.objects["Secret", KEY.namespace, name]["data"]
    return {entry: base64.b64decode(value).decode() for entry, value in data.items()}


def dedicated(config: OperatorConfig = SELF_SIGNED) -> World:
    world = World(config)
    world.spec(traces=MODES["Dedicated"])
    if config is SELF_SIGNED:
        run_now(world.certificates.refresh())
    return world


def issue(world: World, *parts: str) -> None:
    """As cert-manager does, each time from another CA."""
    signer = dedicated()
    lives(signer)
    for part in parts or ("registry", "redis"):
        secret = signer.cluster.objects["Secret", KEY.namespace, f"qwen-{part}-tls"]
        world.cluster.set({**secret, "metadata": {"name": f"qwen-{part}-tls", "namespace": KEY.namespace}})


@pytest.fixture
def world() -> World:
    made = dedicated()
    lives(made)
    return made


def test_it_gets_a_certificate_of_its_name_by_the_ca_that_its_clients_trust(world: World) -> None:
    held = entries(world, "qwen-redis-tls")
    facts = read_certificate(held["tls.crt"], held["tls.key"], held["ca.crt"])
    assert facts is not None
    assert facts.is_signed
    assert facts.names == {HOST}
    assert held["ca.crt"] == world.cluster.objects["ConfigMap", KEY.namespace, "qwen-ca"]["data"]["ca.crt"]
    assert held["tls.key"] != entries(world, "qwen-registry-tls")["tls.key"]


def test_its_users_connect_with_tls_and_the_mounted_cas(world: World) -> None:
    for role in ("writer", "reader"):
        url = urlsplit(entries(world, f"qwen-dedicated-{role}")["url"])
        assert (url.scheme, url.hostname) == ("rediss", HOST)
        assert dict(parse_qsl(url.query)) == {"ssl_ca_certs": "/etc/updraft/ca/ca.crt"}
    (mounted,) = (
        each
        for each in world.cluster.objects[SERVER]["spec"]["template"]["spec"]["volumes"]
        if each["name"] == "updraft-tls"
    )
    assert mounted["secret"]["secretName"] == "qwen-redis-tls"


def test_the_operator_connects_with_the_cas_that_it_knows_now(world: World) -> None:
    server = world.users._dedicated[KEY]
    assert trusted(server._url()) == world.certificates.authorities
    world.clock.advance(LIVES.ca_s * 0.7)
    run_now(world.certificates.refresh())
    lives(world)
    assert world.users._dedicated[KEY] is server
    assert trusted(server._url()) == world.certificates.authorities
    assert world.certificates.authorities.count("BEGIN CERTIFICATE") == 2


def trusted(url: str) -> str:
    return dict(parse_qsl(urlsplit(url).query))["ssl_ca_data"]


def test_its_certificate_is_renewed_and_repaired_and_no_template_changes(world: World) -> None:
    generation, first = world.cluster.objects[SERVER]["metadata"]["generation"], entries(world, "qwen-redis-tls")
    world.clock.advance(LIVES.certificate_s * 0.7)
    lives(world)
    second = entries(world, "qwen-redis-tls")
    assert second["tls.crt"] != first["tls.crt"]
    world.cluster.remove(SECRET)
    lives(world)
    assert entries(world, "qwen-redis-tls")["tls.crt"] != second["tls.crt"]
    assert world.cluster.objects[SERVER]["metadata"]["generation"] == generation


def test_one_that_runs_in_plaintext_changes_once_there_is_a_certificate() -> None:
    world = dedicated(CERT_MANAGER)
    world.config = CONFIG
    world.restart()
    lives(world)
    plain = world.cluster.objects[SERVER]["spec"]["template"]
    world.config = CERT_MANAGER
    world.restart()
    lives(world)
    assert world.cluster.objects["Certificate", KEY.namespace, "qwen-redis-tls"]["spec"]["dnsNames"] == [HOST]
    assert world.cluster.objects[SERVER]["spec"]["template"] == plain, "its pod could not start without one"

    issue(world)
    world.clock.advance(61.0)
    lives(world)
    controllers(world)
    assert "qwen-redis-tls" in str(world.cluster.objects[SERVER]["spec"]["template"])


def test_a_resource_without_one_gets_no_certificate_for_it() -> None:
    world = World(SELF_SIGNED)
    run_now(world.certificates.refresh())
    lives(world)
    assert SECRET not in world.cluster.objects
    assert ("Secret", KEY.namespace, "qwen-registry-tls") in world.cluster.objects


@pytest.mark.parametrize("end", ["Shared", "Named"])
@pytest.mark.parametrize("config", [SELF_SIGNED, CERT_MANAGER], ids=["SelfSigned", "CertManager"])
def test_one_that_is_left_keeps_its_certificate_until_it_is_gone(end: str, config: OperatorConfig) -> None:
    world = dedicated(config)
    if config is CERT_MANAGER:
        issue(world)
    lives(world)
    world.spec(traces=MODES[end])
    world.clock.advance(61.0)
    lives(world)
    assert SERVER not in world.cluster.objects
    assert ("Certificate", KEY.namespace, "qwen-redis-tls") not in world.cluster.objects


def test_a_certificate_is_signed_once_while_nobody_is_pointed_to_its_redis(world: World) -> None:
    world.streams.away.add("qwen-redis.team.svc:6379/0")
    world.spec(traces=MODES["Named"])
    lives(world)
    signed = entries(world, "qwen-redis-tls")["tls.crt"]
    for _ in range(3):
        world.clock.advance(61.0)
        world.settle()
    assert SERVER in world.cluster.objects, "nobody knows what is left in it"
    assert entries(world, "qwen-redis-tls")["tls.crt"] == signed


def test_renewed_by_another_ca_each_server_is_trusted_whichever_is_first() -> None:
    world = dedicated(CERT_MANAGER)
    issue(world)
    lives(world)
    issue(world, "registry")
    world.clock.advance(61.0)
    lives(world)
    trusted_now = world.cluster.objects["ConfigMap", KEY.namespace, "qwen-ca"]["data"]["ca.crt"]
    for part in ("registry", "redis"):
        assert entries(world, f"qwen-{part}-tls")["ca.crt"].strip() in trusted_now
    observed = world.observe()
    assert observed is not None
    assert all(is_ready(observed.speculator, observed.config, observed.certificates, part) for part in PARTS)


def test_pods_that_use_tls_wait_for_the_certificate_of_metrics_and_the_registry_does_not() -> None:
    world = dedicated(CERT_MANAGER)
    world.spec(engine={"type": "SGLang"}, serving={"resources": {"limits": {"nvidia.com/gpu": "1"}}})
    issue(world)
    lives(world)
    before = templates(world)
    world.config = replace(CERT_MANAGER, tls=replace(CERT_MANAGER.tls, has_metrics=True))
    world.restart()
    lives(world)
    after = templates(world)
    assert ("Certificate", KEY.namespace, "qwen-metrics-tls") in world.cluster.objects
    assert {name for name in after if after[name] != before[name]} <= {"qwen-registry"}


def test_a_plain_redis_without_a_certificate_keeps_its_address_and_its_clients() -> None:
    world = dedicated(CERT_MANAGER)
    world.config = CONFIG
    world.restart()
    lives(world)
    world.config = CERT_MANAGER
    world.restart()
    issue(world, "registry")
    lives(world)
    assert urlsplit(entries(world, "qwen-dedicated-writer")["url"]).scheme == "redis"
    assert urlsplit(world.users._dedicated[KEY]._url()).scheme == "redis"
    issue(world)
    lives(world)
    assert urlsplit(entries(world, "qwen-dedicated-writer")["url"]).scheme == "rediss"
    assert trusted(world.users._dedicated[KEY]._url())


def test_a_certificate_that_does_not_come_is_what_the_trainer_waits_for() -> None:
    world = dedicated(CERT_MANAGER)
    issue(world, "registry")
    world.clock.advance(61.0)
    world.settle()
    conditions = world.cluster.objects[OWNER]["status"]["conditions"]
    found = next(each for each in conditions if each["type"] == "TrainerReady")
    assert found["reason"] == "NoCertificate"
    assert "Certificate qwen-redis-tls" in found["message"]


def templates(world: World) -> dict[str, str]:
    kinds = ("Deployment", "StatefulSet")
    found = {name: each for (kind, _, name), each in world.cluster.objects.items() if kind in kinds}
    return {name: str(each["spec"]["template"]) for name, each in found.items()}
