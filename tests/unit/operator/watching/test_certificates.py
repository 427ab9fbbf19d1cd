"""The operator's CA: made once, renewed before it ends, and never taken from somebody else's Secret."""

import base64
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtensionOID, NameOID
from redis.asyncio.connection import parse_url
from tests.support.clock import ManualClock
from tests.support.manifests import CONFIG
from tests.unit.operator.memory_cluster import MemoryCluster
from tests.unit.operator.world import KEY, OWNER, World, run_now

from updraft_chassis.errors import InvalidInput, Unavailable
from updraft_operator.api import names
from updraft_operator.manifests.manifest import Manifest
from updraft_operator.manifests.tls.terms import CertificateOrder, Issuer, Lives, OwnSecrets, Tls, TlsMode, is_due
from updraft_operator.planning.plan import make_plan
from updraft_operator.watching.certificates import CA_KEY, Certificates
from updraft_operator.watching.work_queue import WorkQueue
from updraft_operator.watching.x509 import read_authorities, read_certificate

LIVES = Lives(ca_s=86_400.0, certificate_s=7200.0)
SELF_SIGNED = replace(CONFIG, tls=Tls(mode=TlsMode.SELF_SIGNED, lives=LIVES))
CA_SECRET = ("Secret", "updraft-system", "updraft-ca")
LEAF = ("Secret", KEY.namespace, "qwen-registry-tls")
BUNDLE = ("ConfigMap", KEY.namespace, "qwen-ca")
REDIS = CertificateOrder(secret="updraft-redis-tls", name="updraft-redis.updraft-system.svc")  # noqa: S106 - a name


class Installation:
    """An operator's CA without resources."""

    def __init__(self) -> None:
        self.cluster, self.clock, self.num_changes = MemoryCluster(), ManualClock(), 0
        self.restart()

    def restart(self) -> None:
        def on_change() -> None:
            self.num_changes += 1

        own = OwnSecrets(namespace="updraft-system", authority="updraft-ca", redis=REDIS)
        self.certificates = Certificates(
            self.cluster, SELF_SIGNED, own, self.clock, may_write=lambda: True, on_change=on_change
        )
        run_now(self.certificates.refresh())

    def data(self, name: str) -> dict[str, str]:
        data = self.cluster.objects["Secret", "updraft-system", name]["data"]
        return {entry: base64.b64decode(value).decode() for entry, value in data.items()}


def _entry(world: World, name: str) -> str:
    return base64.b64decode(world.cluster.objects[LEAF]["data"][name]).decode()


def test_a_ca_is_made_once_and_found_again_after_a_restart() -> None:
    installation = Installation()
    first = installation.certificates.authorities
    assert first.count("BEGIN CERTIFICATE") == 1
    installation.restart()
    assert installation.certificates.authorities == first
    assert [verb for verb, kind, name in installation.cluster.writes if name == "updraft-ca"] == ["create"]


def test_two_cas_are_trusted_while_they_overlap_and_one_afterwards() -> None:
    installation = Installation()
    installation.clock.advance(LIVES.ca_s * 0.7)
    run_now(installation.certificates.refresh())
    authorities = read_authorities(installation.data("updraft-ca")["ca.crt"], installation.data("updraft-ca")[CA_KEY])
    assert len(authorities) == 2
    assert installation.certificates.authorities == "".join(each.certificate for each in authorities)
    assert installation.num_changes == 2

    former, new = authorities[1].certificate, authorities[0].certificate
    assert _is_signed(installation, former)
    assert not _is_signed(installation, new)
    installation.clock.advance(3600.0)
    assert _is_signed(installation, new)

    installation.clock.advance(LIVES.ca_s * 0.3)
    run_now(installation.certificates.refresh())
    assert installation.certificates.authorities == authorities[0].certificate


def _is_signed(installation: Installation, authority: str) -> bool:
    """Whether this CA signs now."""
    data = installation.certificates.sign(REDIS)
    facts = read_certificate(data["tls.crt"], data["tls.key"], authority)
    return facts is not None and facts.is_signed


def test_the_certificate_of_the_charts_redis_is_renewed_too() -> None:
    installation = Installation()
    first = installation.data(REDIS.secret)["tls.crt"]
    run_now(installation.certificates.refresh())
    assert installation.data(REDIS.secret)["tls.crt"] == first
    installation.clock.advance(LIVES.certificate_s * 0.67)
    run_now(installation.certificates.refresh())
    data = installation.data(REDIS.secret)
    assert data["tls.crt"] != first
    facts = read_certificate(data["tls.crt"], data["tls.key"], data["ca.crt"])
    assert not is_due(facts, REDIS.name, installation.certificates.redis_authorities, installation.clock.now())


def test_the_operators_own_address_of_redis_has_the_ca_itself() -> None:
    installation = Installation()
    url = "rediss://:p%40ss@updraft-redis.updraft-system.svc:6379/0?ssl_ca_certs=/etc/updraft/ca/ca.crt&db=1"
    own: Mapping[str, object] = parse_url(installation.certificates.redis_url(url))
    assert (own["ssl_ca_data"], own["password"]) == (installation.certificates.authorities, "p@ss")
    assert "ssl_ca_certs" not in own
    installation.certificates.start_over()
    with pytest.raises(Unavailable, match="not known yet"):
        installation.certificates.redis_url(url)


def test_the_empty_secrets_of_the_chart_are_filled_and_keep_their_labels() -> None:
    installation = Installation()
    for name in ("updraft-ca", REDIS.secret):
        installation.cluster.remove(("Secret", "updraft-system", name))
        metadata = {"name": name, "namespace": "updraft-system", "labels": {"app.kubernetes.io/managed-by": "Helm"}}
        run_now(installation.cluster.create({"apiVersion": "v1", "kind": "Secret", "metadata": metadata}))
    installation.restart()
    for name in ("updraft-ca", REDIS.secret):
        assert installation.data(name)["ca.crt"] == installation.certificates.authorities != ""
        labels = installation.cluster.objects["Secret", "updraft-system", name]["metadata"]["labels"]
        assert labels == {"app.kubernetes.io/managed-by": "Helm"}


@pytest.mark.parametrize("content", [{"key": "a"}, {"ca.crt": "a", "ca.key": "b"}], ids=["something", "no PEM"])
def test_a_secret_that_is_not_the_operators_is_left_alone(content: dict[str, str]) -> None:
    installation = Installation()
    encoded = {entry: base64.b64encode(value.encode()).decode() for entry, value in content.items()}
    installation.cluster.edit(CA_SECRET, lambda body: body.update(data=encoded))
    with pytest.raises(InvalidInput, match=r"has no CA of this operator .*; remove its data to get a new CA"):
        run_now(installation.certificates.refresh())
    assert installation.cluster.objects[CA_SECRET]["data"] == encoded
    installation.cluster.remove(CA_SECRET)
    run_now(installation.certificates.refresh())
    assert installation.data("updraft-ca")["ca.crt"] == installation.certificates.authorities


def test_a_clock_that_was_ahead_leaves_the_valid_ca() -> None:
    installation = Installation()
    first = installation.certificates.authorities
    installation.clock.advance(2 * LIVES.ca_s)
    run_now(installation.certificates.refresh())
    assert installation.certificates.authorities != first
    installation.clock.advance(-2 * LIVES.ca_s)
    run_now(installation.certificates.refresh())
    assert installation.certificates.authorities == first
    installation.restart()
    assert installation.certificates.authorities == first
    assert _is_signed(installation, first)


async def test_leadership_that_is_lost_while_a_secret_is_read_ends_no_process() -> None:
    installation = Installation()

    class Losing(MemoryCluster):
        async def get(self, kind: str, namespace: str, name: str) -> Manifest:
            if name == REDIS.secret:
                installation.certificates.start_over()
            return await super().get(kind, namespace, name)

    losing = Losing()
    losing.objects = installation.cluster.objects
    installation.cluster = losing
    installation.clock.advance(LIVES.certificate_s * 0.7)
    before = installation.data(REDIS.secret)
    installation.restart()
    assert installation.data(REDIS.secret) == before
    assert installation.certificates.authorities == ""


def _peculiar(kind: str) -> tuple[str, str]:
    """A certificate that `cryptography` reads, or not, with an exception of its own; and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a")])
    start, end = datetime.fromtimestamp(1_700_000_000, UTC), datetime.fromtimestamp(1_900_000_000, UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(start).not_valid_after(end)
    if kind == "general name":
        alternative = x509.UnrecognizedExtension(ExtensionOID.SUBJECT_ALTERNATIVE_NAME, bytes.fromhex("3005a303300101"))
        builder = builder.add_extension(alternative, critical=False)
    der = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
    if kind == "version":
        der = der.replace(bytes.fromhex("a003020102"), bytes.fromhex("a003020109"), 1)
    protection: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if kind == "encrypted key":
        protection = serialization.BestAvailableEncryption(b"secret")
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection)
    pem = "\n".join(["-----BEGIN CERTIFICATE-----", base64.b64encode(der).decode(), "-----END CERTIFICATE-----", ""])
    return pem, key.private_bytes(*form).decode()


@pytest.mark.parametrize("kind", ["general name", "version", "encrypted key"])
def test_a_peculiar_certificate_is_none_of_ours_and_no_bug(kind: str) -> None:
    pem, key = _peculiar(kind)
    assert read_certificate(pem, key, pem) is None
    with pytest.raises(ValueError, match=r"\S"):
        read_authorities(pem, key)


@pytest.fixture
def world() -> World:
    made = World(SELF_SIGNED)
    run_now(made.certificates.refresh())
    made.settle()
    return made


def test_a_resource_gets_a_certificate_of_its_registrys_name(world: World) -> None:
    facts = read_certificate(_entry(world, "tls.crt"), _entry(world, "tls.key"), _entry(world, "ca.crt"))
    assert facts is not None
    assert (facts.names, facts.is_signed) == (frozenset({"qwen-registry.team.svc"}), True)
    assert world.cluster.objects[BUNDLE]["data"]["ca.crt"] == world.certificates.authorities == facts.authorities
    assert world.cluster.objects[LEAF]["type"] == "kubernetes.io/tls"


def test_it_is_renewed_without_a_change_of_anything_that_restarts_pods(world: World) -> None:
    first, templates = _entry(world, "tls.crt"), _templates(world)
    world.clock.advance(LIVES.certificate_s * 0.5)
    world.settle()
    assert _entry(world, "tls.crt") == first
    world.clock.advance(LIVES.certificate_s * 0.2)
    world.settle()
    assert _entry(world, "tls.crt") != first
    assert _templates(world) == templates


def test_a_new_ca_reaches_pods_and_certificates(world: World) -> None:
    templates = _templates(world)
    world.clock.advance(LIVES.ca_s * 0.7)
    run_now(world.certificates.refresh())
    world.settle()
    assert world.cluster.objects[BUNDLE]["data"]["ca.crt"].count("BEGIN CERTIFICATE") == 2
    assert _entry(world, "ca.crt") == world.certificates.authorities
    assert _templates(world) == templates


def test_an_operator_that_starts_takes_nothing_away_before_it_knows_its_ca(world: World) -> None:
    bundle = world.cluster.objects[BUNDLE]["data"]
    world.restart()
    before = len(world.cluster.writes)
    world.settle()
    assert world.cluster.writes[before:] == []
    run_now(world.certificates.refresh())
    world.settle()
    assert world.cluster.writes[before:] == []
    assert world.cluster.objects[BUNDLE]["data"] == bundle


def _upgraded(mode: TlsMode) -> World:
    """Another operator, of a release with TLS, over what one without made."""
    world = World(CONFIG)
    world.settle()
    world.starts_registry()
    world.settle()
    issuer = Issuer(name="corporate") if mode is TlsMode.CERT_MANAGER else None
    world.config = replace(CONFIG, tls=Tls(mode=mode, issuer=issuer, lives=LIVES))
    world.restart()
    return world


def _registry_ready(world: World) -> tuple[str, str, str]:
    conditions = world.cluster.objects[OWNER]["status"]["conditions"]
    found = next(each for each in conditions if each["type"] == "RegistryReady")
    return found["status"], found["reason"], found["message"]


def _read_at_start(world: World) -> list[object]:
    """Templates of pods, and the settings that pods read when they start."""
    settings = [each["data"] for each in world.cluster.of("ConfigMap") if each["metadata"]["name"] != "qwen-ca"]
    return [*_templates(world), *settings]


def test_an_upgrade_changes_no_pod_before_the_operator_has_its_ca() -> None:
    world = _upgraded(TlsMode.SELF_SIGNED)
    before = _read_at_start(world)
    key = {"ca.crt": base64.b64encode(b"somebody's").decode()}
    where = {"name": "updraft-ca", "namespace": CONFIG.namespace}
    run_now(world.cluster.create({"kind": "Secret", "metadata": where, "data": key}))
    assert not run_now(world.certificates.is_refreshed())
    world.settle()
    assert _read_at_start(world) == before
    assert _registry_ready(world)[:2] == ("False", "NoCertificate")
    assert "Secret updraft-system/updraft-ca has no CA of this operator" in _registry_ready(world)[2]
    world.cluster.remove(CA_SECRET)
    assert run_now(world.certificates.is_refreshed())
    run_now(world.reconciler.reconcile(KEY))
    assert all("/etc/updraft" in str(each) for each in _templates(world)), "in one step"


def test_an_upgrade_changes_no_pod_before_cert_manager_has_signed() -> None:
    world = _upgraded(TlsMode.CERT_MANAGER)
    before = _read_at_start(world)
    world.settle()
    assert _read_at_start(world) == before
    assert _registry_ready(world)[:2] == ("False", "NoCertificate")
    _cert_manager_signs(world, labels={})
    world.settle()
    assert all("/etc/updraft" in str(each) for each in _templates(world))


def _cert_manager_signs(world: World, labels: dict[str, str]) -> None:
    data = Installation().certificates.sign(CertificateOrder(secret="", name="qwen-registry.team.svc"))
    encoded = {entry: base64.b64encode(value.encode()).decode() for entry, value in data.items()}
    metadata = {"name": LEAF[2], "namespace": LEAF[1], "labels": labels}
    world.cluster.set({"kind": "Secret", "metadata": metadata, "type": "kubernetes.io/tls", "data": encoded})


def test_a_preview_shows_what_waits_for_a_certificate() -> None:
    world = _upgraded(TlsMode.SELF_SIGNED)
    observed = world.observe()
    assert observed is not None
    shown = make_plan(replace(observed, is_preview=True), now_unix_s=world.clock.now(), now_s=0.0).apply
    assert {"StatefulSet", "Deployment"} <= {each["kind"] for each in shown}
    assert not {"StatefulSet", "Deployment"} & {each["kind"] for each in world.plan().apply}


@pytest.mark.parametrize("labels", [{}, names.labels(KEY.name, names.REGISTRY)], ids=["a stranger's", "ours"])
def test_the_cas_change_only_with_the_registrys_certificate(labels: dict[str, str]) -> None:
    world = _upgraded(TlsMode.CERT_MANAGER)
    _cert_manager_signs(world, labels=labels)
    world.settle()
    bundle, templates = world.cluster.objects[BUNDLE]["data"], _templates(world)
    world.config = SELF_SIGNED
    world.restart()
    run_now(world.certificates.refresh())
    world.settle()
    assert (world.cluster.objects[BUNDLE]["data"] != bundle) == bool(labels)
    assert _entry(world, "ca.crt") == world.cluster.objects[BUNDLE]["data"]["ca.crt"]
    assert _templates(world) == templates
    accepted = next(each for each in world.cluster.objects[OWNER]["status"]["conditions"] if each["type"] == "Accepted")
    assert accepted["reason"] == ("SpecAccepted" if labels else "NameConflict")


def test_a_ca_that_cert_manager_renews_reaches_pods_as_soon_as_it_says_so() -> None:
    world = _upgraded(TlsMode.CERT_MANAGER)
    _cert_manager_signs(world, labels={})
    world.settle()
    bundle = world.cluster.objects[BUNDLE]["data"]
    _cert_manager_signs(world, labels={})
    world.settle()
    assert world.cluster.objects[BUNDLE]["data"] == bundle, "nobody watches Secrets"
    request = ("Certificate", KEY.namespace, LEAF[2])
    world.cluster.edit(request, lambda body: body.update(status={"revision": 2}))
    world.settle()
    assert world.cluster.objects[BUNDLE]["data"]["ca.crt"] == _entry(world, "ca.crt") != bundle["ca.crt"]


async def test_a_resource_is_looked_at_when_its_certificate_is_to_be_renewed(world: World) -> None:
    work, first = WorkQueue(world.clock.monotonic), _entry(world, "tls.crt")
    again = await world.reconciler.reconcile(KEY)
    assert again is not None
    assert 0.6 < again.after_s / LIVES.certificate_s < 0.68, "two thirds"
    work.add_after(KEY, again.after_s, needs_plan=again.needs_plan)
    world.clock.advance(again.after_s)
    assert (await work.take())[0] == KEY
    assert work.take_need_of_plan(KEY)
    await world.reconciler.reconcile(KEY)
    assert _entry(world, "tls.crt") != first


def test_missing_and_old_certificates_are_counted_until_they_are_renewed(world: World) -> None:
    assert world.metrics.num_overdue(world.clock.now()) == 0
    assert world.metrics.num_overdue(world.clock.now() + LIVES.certificate_s * 0.7) == 0
    assert world.metrics.num_overdue(world.clock.now() + LIVES.certificate_s * 0.85) == 1
    assert _upgraded(TlsMode.CERT_MANAGER).metrics.num_overdue(0.0) == 0
    waiting = _upgraded(TlsMode.CERT_MANAGER)
    waiting.settle()
    assert waiting.metrics.num_overdue(waiting.clock.now()) == 1


def test_a_dry_run_knows_the_ca_and_writes_nothing() -> None:
    installation = Installation()
    before = len(installation.cluster.writes)
    own = OwnSecrets(namespace="updraft-system", authority="updraft-ca", redis=REDIS)
    dry = Certificates(
        installation.cluster, SELF_SIGNED, own, installation.clock, may_write=lambda: False, on_change=lambda: None
    )
    installation.clock.advance(LIVES.ca_s * 0.7)
    run_now(dry.refresh())
    assert dry.authorities == installation.certificates.authorities != ""
    assert len(installation.cluster.writes) == before


def test_leadership_that_is_lost_and_won_takes_nothing_away(world: World) -> None:
    world.certificates.start_over()
    before = len(world.cluster.writes)
    world.settle()
    assert world.cluster.writes[before:] == []


@pytest.mark.attack(
    boundary="registry",
    attack="a certificate that a tenant made, in the registry's Secret",
    outcome="the operator replaces it",
)
def test_a_forged_certificate_is_replaced(world: World) -> None:
    stranger = Installation()
    stranger.certificates.sign(REDIS)
    forged = stranger.certificates.sign(CertificateOrder(secret="", name="qwen-registry.team.svc"))
    forged["ca.crt"] = world.certificates.authorities
    encoded = {entry: base64.b64encode(value.encode()).decode() for entry, value in forged.items()}
    world.cluster.edit(LEAF, lambda body: body.update(data=encoded))
    world.clock.advance(120.0)
    world.settle()
    facts = read_certificate(_entry(world, "tls.crt"), _entry(world, "tls.key"), world.certificates.authorities)
    assert facts is not None
    assert facts.is_signed


def _templates(world: World) -> list[object]:
    kinds = ("Deployment", "StatefulSet")
    return [each["spec"]["template"] for kind in kinds for each in world.cluster.of(kind)]
