"""The cluster through the official client, with its errors as UpdraftErrors."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
from kubernetes.aio import client, config

from updraft_chassis.errors import (
    Conflict,
    Forbidden,
    InvalidInput,
    NotFound,
    Unauthenticated,
    Unavailable,
    UpdraftError,
)
from updraft_operator.api import names
from updraft_operator.manifests.manifest import Manifest
from updraft_operator.watching.cluster import CERTIFICATE, KINDS, OPTIONAL, OURS, RESOURCES

TIMEOUT_S = 20.0
_PAGE = 500
_TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
_METADATA = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
_READ = ("name", "namespace", "resourceVersion", "labels", "finalizers", "generation")
_ERRORS: Mapping[int, type[UpdraftError]] = {
    400: InvalidInput,
    401: Unauthenticated,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    410: Conflict,
    415: InvalidInput,
    422: InvalidInput,
}

_UNTYPED = "failed to create typed patch object"
"""The API server's message, with status 500, about an applied object that has fields or types unknown to its schema."""

Guard = Callable[[], None]
"""Called before every write; raises if this process may not write."""


@asynccontextmanager
async def connected(
    guard: Guard = lambda: None,
    on_write: Callable[[str, str], None] = lambda *_: None,
    *,
    write_s: float = TIMEOUT_S,
) -> AsyncIterator["KubernetesCluster"]:
    """The cluster that this process runs in, or that of KUBECONFIG. Unavailable if there is neither.

    A write that takes longer than `write_s` is abandoned: it must not arrive after another replica became leader.
    """
    configuration = client.Configuration()
    try:
        if not os.environ.get("KUBECONFIG") and await asyncio.to_thread(_TOKEN.exists):
            config.load_incluster_config(client_configuration=configuration)
        else:
            await config.load_kube_config(client_configuration=configuration)
    except config.ConfigException as error:
        raise Unavailable(f"no cluster is configured: {error}; set KUBECONFIG") from error
    async with client.ApiClient(configuration) as api:
        api.user_agent = f"updraft-operator/{version('updraft')}"
        yield KubernetesCluster(api, guard, on_write, write_s)


class KubernetesCluster:
    """See `Cluster`."""

    def __init__(
        self, api: client.ApiClient, guard: Guard, on_write: Callable[[str, str], None], write_s: float
    ) -> None:
        self._api = api
        self._guard = guard
        self._on_write = on_write
        self._write_s = write_s

    async def get(self, kind: str, namespace: str, name: str) -> Manifest:
        return await self._call("GET", RESOURCES[kind].path(namespace, name))

    async def apply(self, content: Manifest, *, is_status: bool = False) -> Manifest:
        kind, metadata = content["kind"], content["metadata"]
        path = RESOURCES[kind].path(metadata["namespace"], metadata["name"], "status" if is_status else "")
        query = {"fieldManager": names.MANAGER, "force": "true"}
        try:
            return await self._write("PATCH", kind, path, content, form="application/apply-patch+yaml", query=query)
        except Conflict as error:  # a forced apply has no field conflicts: the object changed at this very moment
            raise Unavailable(str(error)) from error

    async def served(self, prefix: str) -> set[str]:
        """Kinds that an API group serves, which every account may read; NotFound if there is no such group."""
        return {str(entry["kind"]) for entry in (await self._call("GET", prefix)).get("resources", ())}

    async def kinds(self, *, has_certificates: bool = False) -> tuple[str, ...]:
        """The kinds to watch: those of OPTIONAL only if they are served, Certificates only if this operator requests some."""
        missing = {kind for kind in OPTIONAL if kind not in await self._served(RESOURCES[kind].prefix)}
        missing |= set() if has_certificates else {CERTIFICATE}
        return tuple(kind for kind in KINDS if kind not in missing)

    async def _served(self, prefix: str) -> set[str]:
        try:
            return await self.served(prefix)
        except NotFound:
            return set()

    async def issuer(self) -> str:
        """The issuer of the cluster's ServiceAccount tokens. Every ServiceAccount may read it."""
        found = await self._call("GET", "/.well-known/openid-configuration")
        issuer = str(found.get("issuer") or "")
        if not issuer:
            raise Unavailable("the API server does not say who issues its ServiceAccount tokens")
        return issuer

    async def uid(self, namespace: str) -> str:
        """The UID of a namespace."""
        return str((await self.get("Namespace", "", namespace))["metadata"]["uid"])

    async def token(self, namespace: str, account: str, audience: str, seconds: int) -> tuple[str, int]:
        """A new token of a ServiceAccount for one audience, and how many seconds it is valid: the API server may limit them.

        This is not a write: nothing is stored.
        """
        path = RESOURCES["ServiceAccount"].path(namespace, account, "token")
        body = {"spec": {"audiences": [audience], "expirationSeconds": seconds}}
        answer = await self._call("POST", path, body=body)
        return str(answer["status"]["token"]), int(answer["spec"]["expirationSeconds"])

    async def scale(self, kind: str, namespace: str, name: str, replicas: int) -> None:
        path, patch = RESOURCES[kind].path(namespace, name, "scale"), {"spec": {"replicas": replicas}}
        await self._write("PATCH", kind, path, patch, form="application/merge-patch+json")

    async def merge(self, kind: str, namespace: str, name: str, patch: Mapping[str, Any]) -> Manifest:
        path = RESOURCES[kind].path(namespace, name)
        query = {"fieldManager": names.MANAGER}
        return await self._write("PATCH", kind, path, patch, form="application/merge-patch+json", query=query)

    async def delete(self, kind: str, namespace: str, name: str, uid: str) -> None:
        body = {"propagationPolicy": "Background", "preconditions": {"uid": uid}}
        try:
            await self._write("DELETE", kind, RESOURCES[kind].path(namespace, name), body)
        except (NotFound, Conflict):
            return

    async def create(self, content: Manifest) -> Manifest:
        kind = content["kind"]
        path = RESOURCES[kind].path(content["metadata"]["namespace"])
        return await self._write("POST", kind, path, content, query={"fieldManager": names.MANAGER})

    async def replace(self, content: Manifest) -> Manifest:
        kind, metadata = content["kind"], content["metadata"]
        return await self._write("PUT", kind, RESOURCES[kind].path(metadata["namespace"], metadata["name"]), content)

    async def metadata(self, kind: str, namespace: str) -> list[Manifest]:
        query = {"limit": str(_PAGE), "resourceVersion": ""}
        if kind not in OURS:
            query["labelSelector"] = f"{names.MANAGED_BY}={names.MANAGER}"
        objects: list[Manifest] = []
        while True:
            page = await self._call("GET", RESOURCES[kind].path(namespace), query=query, accept=_METADATA)
            objects += [_lean(entry) for entry in page.get("items") or ()]
            query["continue"] = (page.get("metadata") or {}).get("continue", "")
            if not query["continue"]:
                return objects

    async def pods(self, namespace: str, selector: str) -> list[Manifest]:
        query = {"labelSelector": selector, "resourceVersion": "0"}
        return list((await self._call("GET", RESOURCES["Pod"].path(namespace), query=query)).get("items") or ())

    async def _write(
        self,
        method: str,
        kind: str,
        path: str,
        body: Mapping[str, Any],
        *,
        form: str = "application/json",
        query: Mapping[str, str] | None = None,
    ) -> Manifest:
        self._guard()
        answer = await self._call(method, path, body=body, form=form, query=query, timeout_s=self._write_s)
        self._on_write(kind, method)
        return answer

    async def _call(  # noqa: PLR0913 - what a request is made of
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        form: str = "application/json",
        query: Mapping[str, str] | None = None,
        accept: str = "application/json",
        timeout_s: float = TIMEOUT_S,
    ) -> Manifest:
        request = await self._api.param_serialize(
            method,
            path,
            query_params=[(name, value) for name, value in (query or {}).items() if value],
            header_params={"Accept": accept, "Content-Type": form},
            body=body,
            auth_settings=["BearerToken"],
        )
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._api.call_api(*request, _request_timeout=timeout_s)
                content = await response.read()
        except (aiohttp.ClientError, OSError) as error:  # TimeoutError is one
            raise Unavailable(f"no answer from the API server: {str(error) or type(error).__name__}") from error
        if 200 <= response.status <= 299:
            answer: Manifest = json.loads(content)
            return answer
        raise _error(response.status, content, response.headers)


def _lean(listed: Manifest) -> Manifest:
    """Drop managed fields, which make up most of an object's metadata."""
    return {"metadata": {name: listed["metadata"][name] for name in _READ if name in listed["metadata"]}}


def _error(status: int, content: bytes, headers: Mapping[str, str]) -> UpdraftError:
    try:
        message = json.loads(content).get("message", "")
    except ValueError:  # a proxy's page
        message = ""
    message = message or f"the API server answered with status {status}"
    kind = InvalidInput if _UNTYPED in message else _ERRORS.get(status)
    if kind is not None:
        return kind(message)
    after = headers.get("Retry-After", "")
    return Unavailable(message, float(after) if after.isdigit() else None)
