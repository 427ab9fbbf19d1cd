"""Two tenants of one cluster, with one operator and one Redis, and resources of the same name.

Each tries everything that its own Secrets and ServiceAccounts allow against the other. It reads nothing and writes nothing, and
each refusal has the words that it would have if the other did not exist.
"""

import base64
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import httpx
import pytest
from redis import Redis
from redis.exceptions import AuthenticationError, NoPermissionError
from tests.cluster.access import Api, ApiError
from tests.cluster.control_plane import ControlPlane
from tests.cluster.operator.conftest import Running
from tests.cluster.operator.own_registries import bearing, own_registry, pod_of, token
from tests.cluster.operator.subject import Subject
from tests.support.checkpoints import draft
from tests.support.ports import free_port
from tests.support.redis_server import RedisServer
from tests.support.registry import CALL_S, PodStream, RegistryProcess, publish, registry_stub
from tests.support.wait import wait_until

from updraft.registry.v1 import registry_pb2 as pb
from updraft_chassis import rpc, streams
from updraft_chassis.errors import Unauthenticated
from updraft_operator.api import names

NAME = "chat"
WORDS = b"a person's words"
METRICS_TOKEN = "of-prometheus"  # noqa: S105 - of this test
NOBODY = "test-nobody"
"""A namespace that does not exist."""

ON_KEYS = (
    *("XADD KEY * t x", "XRANGE KEY - +", "XREVRANGE KEY + -", "XREAD STREAMS KEY 0", "XREAD STREAMS OWN KEY 0 0"),
    *("XLEN KEY", "XINFO STREAM KEY", "XINFO GROUPS KEY", "XDEL KEY 1-1", "XTRIM KEY MAXLEN 0", "XPENDING KEY trainer"),
    *("XGROUP CREATE KEY g 0", "XGROUP DESTROY KEY trainer", "XREADGROUP GROUP trainer x STREAMS KEY >"),
    *("XCLAIM KEY trainer x 0 1-1", "XACK KEY trainer 1-1", "XSETID KEY 9-9", "UNLINK KEY", "DEL KEY", "EXISTS KEY"),
    *("TYPE KEY", "TTL KEY", "DUMP KEY", "RENAME KEY OWN", "COPY KEY OWN", "TOUCH KEY", "OBJECT ENCODING KEY"),
    *(
        "MEMORY USAGE KEY",
        "GET LEASE",
        "SET LEASE x",
        "PEXPIRE LEASE 1",
        "EVAL return(redis.call('XLEN',KEYS[1])) 1 KEY",
    ),
)
ON_ALL = (
    *("KEYS *", "SCAN 0", "DBSIZE", "RANDOMKEY", "INFO", "ACL USERS", "ACL LIST", "ACL LOG", "ACL WHOAMI", "ACL CAT"),
    *("CLIENT LIST", "MONITOR", "CONFIG GET *", "PUBSUB CHANNELS", "SLOWLOG GET", "MEMORY STATS", "FLUSHALL"),
)


@dataclass(frozen=True, slots=True)
class Tenant:
    """A namespace with a resource, and its Secrets and tokens as the operator made them."""

    subject: Subject
    installation: str

    @property
    def key(self) -> str:
        return stream_key(self.installation, self.subject.namespace)

    def url(self, role: str) -> str:
        data = self.subject.get("Secret", f"{NAME}-redis-{role}")["data"]
        return base64.b64decode(data["url"]).decode()

    def account(self, end: str) -> str:
        return f"system:serviceaccount:{self.subject.namespace}:{NAME}{end}"

    @property
    def groups(self) -> tuple[str, ...]:
        """Of its ServiceAccounts."""
        return ("system:serviceaccounts", f"system:serviceaccounts:{self.subject.namespace}", "system:authenticated")


def stream_key(installation: str, namespace: str) -> str:
    (key,) = streams.keys(f"{installation}:{namespace}", NAME, 1)
    return key


@pytest.fixture(scope="module")
def port() -> int:
    """The port of the one registry that runs, which the operator must know before."""
    return free_port()


@pytest.fixture(scope="module")
def settings(port: int, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    token_file = tmp_path_factory.mktemp("metrics") / "token"
    token_file.write_text(METRICS_TOKEN)
    return {"registry_address": f"127.0.0.1:{port}", "metrics_token_file": token_file}


@pytest.fixture
def tenants(operator: Running, api: Api, home: str) -> Iterator[tuple[Tenant, Tenant]]:
    """The attacker, and the other."""
    installation = str(api.get(f"/api/v1/namespaces/{home}")["metadata"]["uid"])
    made = []
    for _ in range(2):
        namespace = f"test-{secrets.token_hex(4)}"
        api.create("/api/v1/namespaces", {"metadata": {"name": namespace}})
        subject = Subject(api, namespace, NAME)
        subject.create(rollout={"strategy": "Immediate"})
        made.append(Tenant(subject, installation))
    for tenant in made:
        tenant.subject.wait_until_built()
        for role in ("writer", "reader"):
            wait_until(lambda t=tenant, r=role: t.subject.exists("Secret", f"{NAME}-redis-{r}"), what="its Secrets")  # type: ignore[misc] # defaults
            wait_until(lambda t=tenant, r=role: can_connect(t.url(r)), what="its Redis users")  # type: ignore[misc]
    yield made[0], made[1]
    for tenant in made:
        api.delete(f"/api/v1/namespaces/{tenant.subject.namespace}")


def can_connect(url: str) -> bool:
    with Redis.from_url(url) as client:
        try:
            client.xlen("x")
        except AuthenticationError:
            return False
        except NoPermissionError:
            return True
    return False


def run(client: Redis, *words: str) -> Any:
    """A command whose method in redis-py is missing or has no types."""
    return client.execute_command(*words)  # type: ignore[no-untyped-call] # of redis-py


def refusal(client: Redis, command: str, own: str, key: str) -> str:
    """What Redis says to a command on a key."""
    lease = key.removesuffix(":samples:v1") + ":trainer"
    given = {"KEY": key, "OWN": own, "LEASE": lease}
    words = [given.get(word, word) for word in command.split()]
    with pytest.raises(NoPermissionError) as refused:
        run(client, *words)
    return str(refused.value)


@pytest.mark.attack(
    boundary="tenants",
    attack="both Redis users of one namespace against the streams and the lease of another, with 45 commands",
    outcome="refused, in the words that a namespace gets which does not exist; nothing is read or changed",
)
def test_a_tenants_redis_users_read_write_and_learn_nothing_of_the_other(
    tenants: tuple[Tenant, Tenant], redis_server: RedisServer
) -> None:
    attacker, other = tenants
    with Redis.from_url(other.url("writer")) as pod:
        pod.xadd(other.key, {"t": WORDS})
    nobodys = stream_key(attacker.installation, NOBODY)
    for role in ("writer", "reader"):
        with Redis.from_url(attacker.url(role)) as client:
            for command in ON_KEYS:
                said = [refusal(client, command, attacker.key, key) for key in (other.key, nobodys)]
                assert said[0] == said[1], command
            for command in ON_ALL:
                refusal(client, command, attacker.key, "")
    with Redis.from_url(redis_server.url) as administrator:
        assert [fields for _, fields in administrator.xrange(other.key)] == [{b"t": WORDS}]
        assert not administrator.exists(attacker.key, nobodys)
        administrator.delete(other.key)


@pytest.mark.attack(
    boundary="tenants",
    attack="guessing whether another namespace has a Redis user, by its name and a wrong password",
    outcome="the same answer for a user that exists and for one that does not",
)
def test_a_wrong_password_does_not_tell_whether_the_user_exists(tenants: tuple[Tenant, Tenant]) -> None:
    attacker, other = tenants
    theirs = unquote(urlsplit(other.url("writer")).username or "")
    invented = theirs.replace(other.subject.namespace, NOBODY)
    assert theirs != invented
    said = set()
    with Redis.from_url(attacker.url("writer")) as client:
        for user in (theirs, invented):
            with pytest.raises(AuthenticationError) as refused:
                run(client, "AUTH", user, "0" * 64)
            said.add(str(refused.value))
    assert len(said) == 1


@pytest.mark.attack(
    boundary="tenants",
    attack="every token that a namespace can get, also for the audience of another's registry, shown to that registry",
    outcome="UNAUTHENTICATED on calls of every role; a forged report and a forged draft change nothing",
)
async def test_a_tenants_tokens_open_nothing_at_the_others_registry(
    tenants: tuple[Tenant, Tenant], operator: Running, port: int, tmp_path: Path
) -> None:
    attacker, other = tenants
    theirs = f"updraft-registry/{other.subject.namespace}/{NAME}"
    with own_registry(operator.cluster, other.subject, port, tmp_path) as registry:
        async with bearing(registry, token(other.subject, names.TRAINER)) as trainer:
            await publish(registry_stub(trainer), draft(seed=1), speculator=NAME)
        pod = str(pod_of(other.subject, names.SERVING)["metadata"]["name"])
        tokens = [token(attacker.subject, part) for part in (names.SERVING, names.TRAINER, names.REGISTRY)]
        for end in ("", "-serving", "-trainer", "-registry", "-import"):
            path = attacker.subject.path("ServiceAccount", f"{NAME}{end}", "token")
            wanted = {"spec": {"audiences": [theirs]}}
            tokens.append(str(attacker.subject.api.create(path, wanted)["status"]["token"]))
        for stolen in tokens:
            await opens_nothing(registry, stolen, pod)
        async with bearing(registry, token(other.subject, names.TRAINER)) as trainer:
            with rpc.errors():
                listed = await registry_stub(trainer).List(pb.ListRequest(speculator=NAME), timeout=CALL_S)
        assert [each.version for each in listed.versions] == [1]
        assert listed.speculators[0].pods.connected == 0


async def opens_nothing(registry: RegistryProcess, stolen: str, pod: str) -> None:
    async with bearing(registry, stolen) as thief:
        stub, stream = registry_stub(thief), PodStream(thief, pod)
        stream.identity.speculator = NAME
        with pytest.raises(Unauthenticated), rpc.errors():
            await stub.List(pb.ListRequest(), timeout=CALL_S)
        with pytest.raises(Unauthenticated), rpc.errors():
            await stub.Pin(pb.PinRequest(speculator=NAME, version=1), timeout=CALL_S)
        with pytest.raises(Unauthenticated):
            await publish(stub, draft(seed=2), speculator=NAME)
        with pytest.raises(Unauthenticated):
            await reported(stream)


async def reported(stream: PodStream) -> None:
    await stream.report()
    await stream.receive()


SERVED = (
    *("secrets", "configmaps", "pods", "services", "serviceaccounts", "persistentvolumeclaims", "events"),
    *("apps/deployments", "apps/statefulsets", "networking.k8s.io/networkpolicies", "policy/poddisruptionbudgets"),
    *(f"{names.GROUP}/{plural}" for plural in (names.SPECULATORS, names.DRAFT_VERSIONS, names.DRAFT_IMPORTS)),
)


def collection(resource: str, namespace: str) -> str:
    group, _, plural = resource.rpartition("/")
    version = names.VERSION if group == names.GROUP else "v1"
    root = f"/apis/{group}/{version}" if group else "/api/v1"
    return f"{root}/namespaces/{namespace}/{plural}"


@pytest.mark.attack(
    boundary="tenants",
    attack="a person who may edit one namespace, and its ServiceAccounts, in the Kubernetes API of another",
    outcome="Forbidden, in the words that a namespace gets which does not exist",
)
def test_nobody_of_a_namespace_reaches_the_other_through_the_api(
    tenants: tuple[Tenant, Tenant], kubernetes: ControlPlane, api: Api
) -> None:
    attacker, other = tenants
    binding = {
        "metadata": {"name": "ann-edits"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "edit"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "ann"}],
    }
    api.create(f"/apis/rbac.authorization.k8s.io/v1/namespaces/{attacker.subject.namespace}/rolebindings", binding)
    people: dict[str, tuple[str, ...]] = {"ann": ("system:authenticated",)}
    people |= {attacker.account(end): attacker.groups for end in ("", "-serving", "-trainer", "-registry", "-import")}
    with kubernetes.api(user="ann", groups=people["ann"]) as ann:
        wait_until(lambda: may_list(ann, attacker.subject.namespace), what="her right to her own namespace")
    for user, groups in people.items():
        with kubernetes.api(user=user, groups=groups) as client:
            for resource in SERVED:
                theirs, nobodys = (forbidden(client, resource, where) for where in (other.subject.namespace, NOBODY))
                assert theirs == nobodys
    assert other.subject.exists()


def may_list(client: Api, namespace: str) -> bool:
    try:
        client.get(collection("configmaps", namespace))
    except ApiError:
        return False
    return True


def forbidden(client: Api, resource: str, namespace: str) -> list[str]:
    """What the API server says to each verb, without the namespace's name."""
    where = collection(resource, namespace)
    said = []
    calls: list[Callable[[], object]] = [
        lambda: client.get(where),
        lambda: client.get(f"{where}/{NAME}"),
        lambda: client.create(where, {"metadata": {"name": "mine"}}),
        lambda: client.patch(f"{where}/{NAME}", {"metadata": {"labels": {"mine": "yes"}}}),
        lambda: client.delete(f"{where}/{NAME}"),
        lambda: client.create(f"{collection('serviceaccounts', namespace)}/{NAME}/token", {"spec": {}}),
    ]
    for call in calls:
        with pytest.raises(ApiError) as refused:
            call()
        assert refused.value.code == 403
        said.append(refused.value.message.replace(namespace, "NAMESPACE"))
    return said


@pytest.mark.attack(
    boundary="tenants",
    attack="finding another namespace in the status of one's own resource",
    outcome="conditions name nothing of others",
)
def test_a_status_tells_nothing_of_the_other(tenants: tuple[Tenant, Tenant]) -> None:
    attacker, other = tenants
    attacker.subject.run(names.REGISTRY)
    wait_until(lambda: bool(attacker.subject.conditions()), what="conditions")
    said = str(attacker.subject.get()["status"]) + str(list(attacker.subject.events()))
    assert other.subject.namespace not in said
    objects = str(attacker.subject.objects())
    assert other.subject.namespace not in objects


@pytest.mark.attack(
    boundary="tenants",
    attack="looking for another namespace in the operator's metrics, which need a token",
    outcome="401; Prometheus, which has the token, sees all",
)
def test_the_operators_metrics_tell_nothing_without_their_token(
    tenants: tuple[Tenant, Tenant], operator: Running
) -> None:
    attacker, other = tenants
    url = f"http://127.0.0.1:{operator.process.port}/metrics"
    theirs = token(attacker.subject, names.SERVING)
    for headers in ({}, {"Authorization": f"Bearer {theirs}"}):
        refused = httpx.get(url, headers=headers)
        assert refused.status_code == 401
        assert other.subject.namespace not in refused.text

    def is_shown() -> bool:
        return other.subject.namespace in httpx.get(url, headers={"Authorization": f"Bearer {METRICS_TOKEN}"}).text

    wait_until(is_shown, what="the other in Prometheus' metrics")
