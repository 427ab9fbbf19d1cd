"""A Redis for one speculator: one pod with a persistent volume, a Service, its configuration and a NetworkPolicy.

It is set up as the chart's Redis is, also with TLS, except for its administrator. The password of that user is derived from a
key that only the operator has, and nothing in the speculator's namespace holds it: the configuration has a hash. Probes have a
user of their own that may only PING, with a password that the pod makes when it starts. With TLS, it may also CONFIG SET:
Redis reads a renewed certificate when it is told to. Whoever reads that password, inside the pod, can also read the traces.
Rejected: a Secret with the password for each Redis in the operator's namespace, which nobody would delete after a resource
whose operator was away; a default user without a password, which lifts the limits that Redis has for unauthenticated clients.
"""

import hashlib
import hmac
from typing import Any

from kubernetes.utils.quantity import parse_quantity

from updraft_artifacts.sizing import redis_memory, redis_process_memory, usual
from updraft_operator.api import names
from updraft_operator.api.speculator import AdaptiveSpeculator, Redis, RedisStorage, Workload
from updraft_operator.manifests import network, pod
from updraft_operator.manifests.manifest import Manifest, OperatorConfig, manifest
from updraft_operator.manifests.redis_users import hashed, password_of
from updraft_operator.manifests.tls import objects as tls

PORT = 6379
KINDS = ("ConfigMap", "StatefulSet", "Service", "NetworkPolicy")
"""Kinds of its objects."""

_ADMINISTRATOR = "updraft-administrator"
_MIB = 1024 * 1024
_BASE = 64 * _MIB
"""For the process itself."""
_LEAST = 64 * _MIB
_USER = 999
"""User `redis` of the official image."""

_CONFIG = f"""\
include /run/redis/probe.conf
bind * -::*
port {PORT}
dir /data
user default off
user {_ADMINISTRATOR} on #PASSWORD_HASH ~* &* +@all
# Acknowledged traces outlive the pod; at most the last second is lost.
appendonly yes
appendfsync everysec
save ""
# A full Redis refuses new traces, which are counted as dropped. It never evicts traces that nobody has read.
maxmemory MAX_MEMORY
maxmemory-policy noeviction
tcp-keepalive 60
# Twice the largest trace, so that nobody writes an entry of 512 MB, which the trainer would have to read.
proto-max-bulk-len 16mb
"""

_TLS = f"""\
port 0
tls-port {PORT}
tls-cert-file {tls.SERVER_FOLDER}/{tls.CERT}
tls-key-file {tls.SERVER_FOLDER}/{tls.KEY}
# Passwords tell who calls.
tls-auth-clients no
# For the probes.
unixsocket /run/redis/redis.sock"""

_START = """\
umask 077
password=$(head -c 32 /dev/urandom | sha256sum | cut -c 1-64)
printf '%s' "$password" > /run/redis/probe
printf 'user probe on >%s nocommands COMMANDS\\n' "$password" > /run/redis/probe.conf
exec redis-server /etc/redis/redis.conf
"""
_CLIENT = "REDISCLI_AUTH=$(cat /run/redis/probe) redis-cli SOCKET --user probe"
_PING = f"{_CLIENT} ping | grep -q PONG"
_RELOAD = f"""\
new={tls.SERVER_FOLDER}/{tls.CERT}; cmp -s $new /run/redis/{tls.CERT} ||
  {{ cp $new /run/redis/next && {_CLIENT} config set tls-cert-file $new | grep -q OK &&
    mv /run/redis/next /run/redis/{tls.CERT}; }}
"""
"""Connections stay open. The copy is made first: it may be older than what Redis reads, never newer."""


def password(key: bytes, namespace: str, speculator: str) -> str:
    """The administrator's, as 64 hexadecimal digits."""
    return hmac.new(key, f"redis/{namespace}/{speculator}".encode(), hashlib.sha256).hexdigest()


def url(key: bytes, address: str, namespace: str, speculator: str, *, has_tls: bool = False) -> str:
    """The administrator's address; `address` is a template with {name} and {namespace}. With TLS, it names the file with the
    CAs in the pods of the resource."""
    where = address.format(name=speculator, namespace=namespace)
    scheme, query = ("rediss", f"?ssl_ca_certs={tls.CA_FILE}") if has_tls else ("redis", "")
    return f"{scheme}://{_ADMINISTRATOR}:{password(key, namespace, speculator)}@{where}/0{query}"


def max_memory(owner: AdaptiveSpeculator) -> int:
    """Bytes that it may use for traces, at least 64 MiB."""
    redis = owner.spec.traces.redis
    if redis is not None and redis.max_memory is not None:
        return max(_LEAST, int(parse_quantity(redis.max_memory)))
    size = owner.spec.traces.max_size
    return max(_LEAST, redis_memory(int(parse_quantity(size)) if size is not None else usual().stream.amount))


def objects(owner: AdaptiveSpeculator, config: OperatorConfig, address: str, *, when_deleted: str) -> list[Manifest]:
    """All objects. `address` is that of the administrator; `when_deleted`: whether to Delete or Retain the volume with the
    StatefulSet."""
    password_hash = hashed(password_of(address))
    content = _CONFIG.replace("PASSWORD_HASH", password_hash).replace("MAX_MEMORY", str(max_memory(owner)))
    if config.tls.is_on:
        content = content.replace(f"port {PORT}", _TLS)
    settings = {"redis.conf": content}
    own = network.from_own(owner, config.namespace, PORT)
    return [
        pod.settings(owner, names.REDIS, settings),
        _stateful_set(owner, config, settings, when_deleted),
        _service(owner),
        network.policy(owner, names.REDIS, [own], is_silent=True),
    ]


def with_volume(owner: AdaptiveSpeculator, live: Manifest) -> Manifest:
    """The StatefulSet as it is, but deleted with its volume."""
    spec = {**live["spec"], "persistentVolumeClaimRetentionPolicy": {"whenDeleted": "Delete", "whenScaled": "Retain"}}
    return manifest(
        owner, "apps/v1", "StatefulSet", names.child(owner.metadata.name, names.REDIS), names.REDIS, spec=spec
    )


def _stateful_set(
    owner: AdaptiveSpeculator, config: OperatorConfig, settings: dict[str, str], when_deleted: str
) -> Manifest:
    name = names.child(owner.metadata.name, names.REDIS)
    storage = (owner.spec.traces.redis or Redis()).storage or RedisStorage()
    volumes: list[dict[str, Any]] = [
        {"name": "config", "configMap": {"name": name}},
        {"name": "run", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
        *tls.server_volumes(owner, config, names.REDIS),
    ]
    if storage.claim_name is not None:
        volumes.append({"name": "data", "persistentVolumeClaim": {"claimName": storage.claim_name}})
    parts = pod.PodParts(
        containers=[_container(owner, config)],
        volumes=volumes,
        settings=settings,
        more={"serviceAccountName": "default", "terminationGracePeriodSeconds": 60},
    )
    template = pod.template(owner, names.REDIS, parts, Workload(), config.images)
    if config.images.has_fixed_user:
        template["spec"]["securityContext"] |= {"runAsUser": _USER, "runAsGroup": _USER, "fsGroup": _USER}
    content: dict[str, Any] = {
        "replicas": 1,
        "serviceName": name,
        "podManagementPolicy": "Parallel",  # as of the registry
        "selector": {"matchLabels": names.selector(owner.metadata.name, names.REDIS)},
        "template": template,
        "persistentVolumeClaimRetentionPolicy": {"whenDeleted": when_deleted, "whenScaled": "Retain"},
    }
    if storage.claim_name is None:
        content["volumeClaimTemplates"] = [
            {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "metadata": {"name": "data", "labels": names.selector(owner.metadata.name, names.REDIS)},
                "spec": pod.claim_spec(storage),
            }
        ]
    return manifest(owner, "apps/v1", "StatefulSet", name, names.REDIS, spec=content)


def _container(owner: AdaptiveSpeculator, config: OperatorConfig) -> dict[str, Any]:
    has_tls, images = config.tls.is_on, config.images
    memory = redis_process_memory(max_memory(owner)) + _BASE
    resources = {
        "requests": {"cpu": "100m", "memory": f"{memory // 2 // _MIB}Mi"},
        "limits": {"memory": f"{memory // _MIB}Mi"},
    }
    socket, commands = ("-s /run/redis/redis.sock", "+ping +config|set") if has_tls else ("", "+ping")
    ping, ready = (
        {"exec": {"command": ["sh", "-c", script.replace("SOCKET", socket)]}, "timeoutSeconds": 5}
        for script in (_PING, f"{_RELOAD}{_PING}" if has_tls else _PING)
    )
    return pod.container(
        "redis",
        images.redis,
        images,
        Workload(resources=resources),
        command=["sh", "-ec"],
        args=[_START.replace("COMMANDS", commands)],
        ports=[{"name": "redis", "containerPort": PORT}],
        # While it reads its log it answers LOADING: it is not ready, but alive.
        startupProbe={**ping, "periodSeconds": 2, "failureThreshold": 300},
        readinessProbe={**ready, "periodSeconds": 5, "failureThreshold": 3},
        livenessProbe={"tcpSocket": {"port": "redis"}, "periodSeconds": 20, "timeoutSeconds": 5, "failureThreshold": 6},
        volumeMounts=[
            {"name": "config", "mountPath": "/etc/redis", "readOnly": True},
            {"name": "run", "mountPath": "/run/redis"},
            {"name": "data", "mountPath": "/data"},
            *tls.server_mounts(config),
        ],
    )


def _service(owner: AdaptiveSpeculator) -> Manifest:
    name = owner.metadata.name
    content = {
        "selector": names.selector(name, names.REDIS),
        "ports": [{"name": "redis", "port": PORT, "targetPort": "redis", "protocol": "TCP"}],
    }
    return manifest(owner, "v1", "Service", names.child(name, names.REDIS), names.REDIS, spec=content)
