"""The API server: short calls as the user of the kubeconfig; refusals and outages become UpdraftErrors.

Only this module imports the `kubernetes` package, and only when a command needs it: the import takes half a second.
"""

import json
import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from updraft_chassis.errors import (
    Conflict,
    Forbidden,
    InvalidInput,
    NotFound,
    Unauthenticated,
    Unavailable,
    UpdraftError,
)
from updraft_cli.backends.objects import DRAFT_IMPORTS, DRAFT_VERSIONS, GROUP, SPECULATORS, Json

if TYPE_CHECKING:
    from kubernetes.client import ApiClient, ApiException, Configuration

MANAGER = "kubectl-updraft"
"""Field manager of what this program sets."""

_VERSION = "v1alpha1"
_TIMEOUT_S = (5.0, 30.0)
"""To connect, and to be answered: a person waits at the other end."""
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_GONE = 410

_ERRORS: dict[int, type[UpdraftError]] = {
    400: InvalidInput,
    401: Unauthenticated,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    422: InvalidInput,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class KubeContext:
    """Cluster, user and namespace; an absent value is that of the kubeconfig."""

    kubeconfig: Path | None = None
    context: str | None = None
    namespace: str | None = None
    is_everywhere: bool = False
    """All namespaces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectList:
    """Objects of one state, and the resource version from which a watch can continue."""

    items: tuple[Json, ...]
    resource_version: str


class ClusterClient:
    """One namespace of an API server, or all."""

    def __init__(self, client: "ApiClient", namespace: str | None) -> None:
        from kubernetes.client import CoreV1Api, CustomObjectsApi  # noqa: PLC0415 - see above

        self._client = client
        self._objects = CustomObjectsApi(client)
        self._core = CoreV1Api(client)
        self._host = client.configuration.host
        self._namespace = namespace

    @property
    def namespace(self) -> str:
        return self._namespace or ""

    def speculators(self, name: str = "") -> ObjectList:
        """List AdaptiveSpeculators; with a name, at most that one."""
        return self._list(SPECULATORS, _selector("metadata.name", name))

    def speculator(self, name: str) -> Json:
        """Return the AdaptiveSpeculator of that name; NotFound lists the existing ones."""
        try:
            with _sentences(self._host):
                content: Any = self._objects.get_namespaced_custom_object(
                    GROUP, _VERSION, self.namespace, SPECULATORS, name, _request_timeout=_TIMEOUT_S
                )
                return dict(content)
        except NotFound as error:
            known = ", ".join(item["metadata"]["name"] for item in self.speculators().items) or "none"
            message = f"namespace {self.namespace} has no AdaptiveSpeculator {name}; it has {known}"
            raise NotFound(message) from error

    def versions(self, speculator: str = "") -> tuple[Json, ...]:
        """List DraftVersions; with a name, those of that speculator."""
        return self._list(DRAFT_VERSIONS, _selector("spec.speculatorRef.name", speculator)).items

    def imports(self, speculator: str = "") -> tuple[Json, ...]:
        """List DraftImports; with a name, those of that speculator. None for an older role or CRD."""
        try:
            return self._list(DRAFT_IMPORTS, _selector("spec.speculatorRef.name", speculator)).items
        except (Forbidden, NotFound):
            return ()

    def config_map(self, name: str) -> dict[str, str]:
        """Return the data of a ConfigMap."""
        with _sentences(self._host):
            found: Any = self._core.read_namespaced_config_map(name, self.namespace, _request_timeout=_TIMEOUT_S)
            return dict(found.data or {})

    def object(self, group: str, version: str, plural: str, name: str) -> Json:
        """Return an object of any API group but the core one."""
        with _sentences(self._host):
            content: Any = self._objects.get_namespaced_custom_object(
                group, version, self.namespace, plural, name, _request_timeout=_TIMEOUT_S
            )
            return dict(content)

    def pods(self, selector: str) -> tuple[Json, ...]:
        """List the pods with these labels."""
        with _sentences(self._host):
            response: Any = self._core.list_namespaced_pod(  # plain, as the Events are
                self.namespace, label_selector=selector, _preload_content=False, _request_timeout=_TIMEOUT_S
            )
            return tuple(json.loads(response.data)["items"])

    def pod_metrics(self, pod: str, port: int, *, scheme: str = "http") -> str:
        """Return the metrics of a pod, which the API server fetches from its port. It takes any certificate."""
        with _sentences(self._host):
            response: Any = self._core.connect_get_namespaced_pod_proxy_with_path(
                f"{scheme}:{pod}:{port}", self.namespace, "metrics", _preload_content=False, _request_timeout=_TIMEOUT_S
            )
            return str(response.data.decode())

    def registry_token(self, speculator: str, for_s: int) -> tuple[str, datetime]:
        """Return a token of a speculator's own ServiceAccount that only its registry accepts, and when it expires."""
        audience = f"updraft-registry/{self.namespace}/{speculator}"
        request: Any = {"spec": {"audiences": [audience], "expirationSeconds": for_s}}
        with _sentences(self._host):
            answer: Any = self._core.create_namespaced_service_account_token(
                speculator, self.namespace, request, _request_timeout=_TIMEOUT_S
            )
        return str(answer.status.token), answer.status.expiration_timestamp

    def registry_ca(self, speculator: str) -> str:
        """Return the CAs of the registry's certificate, in PEM format; empty if it speaks no TLS."""
        try:
            with _sentences(self._host):
                found: Any = self._core.read_namespaced_config_map(
                    f"{speculator}-ca", self.namespace, _request_timeout=_TIMEOUT_S
                )
        except NotFound:
            return ""
        return str((found.data or {}).get("ca.crt", ""))

    def may_patch(self, name: str) -> bool:
        """Ask the API server whether this user may patch an AdaptiveSpeculator."""
        from kubernetes.client import AuthorizationV1Api  # noqa: PLC0415 - see above

        asked = {"group": GROUP, "resource": SPECULATORS, "verb": "patch", "name": name, "namespace": self.namespace}
        review: Any = {"spec": {"resourceAttributes": asked}}
        with _sentences(self._host):
            answer: Any = AuthorizationV1Api(self._client).create_self_subject_access_review(
                review, _request_timeout=_TIMEOUT_S
            )
        return bool(answer.status.allowed)

    def events(self) -> tuple[Json, ...]:
        """List the Events about our kinds, in no order."""
        return tuple(item for kind in ("AdaptiveSpeculator", "DraftVersion") for item in self._events(kind))

    def patch(self, name: str, rollout: Json, *, is_dry_run: bool) -> Json:
        """Merge `rollout` into `spec.rollout`, and return the object; None removes a field. A dry run is checked, not kept."""
        with _sentences(self._host):
            patched: Any = self._objects.patch_namespaced_custom_object(
                GROUP,
                _VERSION,
                self.namespace,
                SPECULATORS,
                name,
                {"spec": {"rollout": dict(rollout)}},
                field_manager=MANAGER,
                dry_run="All" if is_dry_run else None,
                field_validation="Strict",
                _content_type="application/merge-patch+json",
                _request_timeout=_TIMEOUT_S,
            )
        return dict(patched)

    def annotate(self, name: str, annotations: Mapping[str, str], *, is_dry_run: bool) -> None:
        """Merge these annotations into those of an AdaptiveSpeculator. A dry run is checked, not kept."""
        with _sentences(self._host):
            self._objects.patch_namespaced_custom_object(
                GROUP,
                _VERSION,
                self.namespace,
                SPECULATORS,
                name,
                {"metadata": {"annotations": dict(annotations)}},
                field_manager=MANAGER,
                dry_run="All" if is_dry_run else None,
                _content_type="application/merge-patch+json",
                _request_timeout=_TIMEOUT_S,
            )

    def changes(self, name: str, resource_version: str, within_s: int) -> Iterator[tuple[str, Json]]:
        """Yield (ADDED, MODIFIED or DELETED, AdaptiveSpeculator) since `resource_version`, for `within_s` seconds."""
        options: dict[str, Any] = {
            **_selector("metadata.name", name),
            "resource_version": resource_version,
            "watch": True,
            "timeout_seconds": within_s,
            "_request_timeout": (_TIMEOUT_S[0], within_s + 10.0),
            "_preload_content": False,
        }
        with _sentences(self._host):
            response = self._called(SPECULATORS, options)
            try:
                for line in _lines(response.stream()):
                    change = json.loads(line)
                    if change["type"] == "ERROR":
                        if change["object"].get("code") == _GONE:
                            return  # too long ago: the caller lists again
                        raise Unavailable(change["object"].get("message", "the watch failed"))
                    yield change["type"], change["object"]
            finally:
                response.close()

    def _list(self, kind: str, options: dict[str, Any]) -> ObjectList:
        with _sentences(self._host):
            content = self._called(kind, {**options, "_request_timeout": _TIMEOUT_S})
        return ObjectList(items=tuple(content["items"]), resource_version=content["metadata"]["resourceVersion"])

    def _called(self, kind: str, options: dict[str, Any]) -> Any:
        if self._namespace is None:
            return self._objects.list_cluster_custom_object(GROUP, _VERSION, kind, **options)
        return self._objects.list_namespaced_custom_object(GROUP, _VERSION, self._namespace, kind, **options)

    def _events(self, kind: str) -> tuple[Json, ...]:
        with _sentences(self._host):
            response: Any = self._core.list_namespaced_event(  # not read into its model: plain, as all else here is
                self.namespace,
                field_selector=f"involvedObject.kind={kind}",
                _preload_content=False,
                _request_timeout=_TIMEOUT_S,
            )
            return tuple(json.loads(response.data)["items"])


@contextmanager
def connected(context: KubeContext) -> Iterator[ClusterClient]:
    from kubernetes import client  # noqa: PLC0415 - see above

    configuration = client.Configuration()
    namespace = _configure(configuration, context)
    configuration.retries = False  # a refused connection is told at once
    with client.ApiClient(configuration) as connection:
        connection.user_agent = MANAGER
        yield ClusterClient(connection, None if context.is_everywhere else context.namespace or namespace)


def contexts(kubeconfig: Path | None) -> tuple[str, ...]:
    config = _config()
    try:
        entries, _ = config.list_kube_config_contexts(str(kubeconfig) if kubeconfig else None)
    except config.ConfigException:
        return ()
    return tuple(context["name"] for context in entries)


def _configure(configuration: "Configuration", context: KubeContext) -> str:
    """Load the kubeconfig, else the configuration of a pod; return its namespace."""
    config = _config()
    file = str(context.kubeconfig) if context.kubeconfig else None
    try:
        with _complaints() as complaints:
            config.load_kube_config(config_file=file, context=context.context, client_configuration=configuration)
        known, active = config.list_kube_config_contexts(file)
    except (config.ConfigException, yaml.YAMLError, OSError) as error:
        if file is None and context.context is None and _NAMESPACE_FILE.exists():
            config.load_incluster_config(client_configuration=configuration)
            return _NAMESPACE_FILE.read_text().strip()
        raise InvalidInput(f"the kubeconfig names no usable cluster: {_line(str(error))}") from error
    if complaints:
        raise Unauthenticated(f"the kubeconfig's credential plugin failed: {_line(complaints[0])}")
    chosen = next((entry for entry in known if entry["name"] == context.context), active)["context"]
    _check_user(file, chosen.get("user", ""))
    return chosen.get("namespace") or "default"


def _check_user(file: str | None, name: str) -> None:
    """Refuse a user that impersonates another: the client would act as the first user, who may have more rights."""
    from kubernetes.config import kube_config  # noqa: PLC0415 - see above

    merged = kube_config.KubeConfigMerger(file or kube_config.KUBE_CONFIG_DEFAULT_LOCATION).config.value
    for user in merged["users"]:
        if user["name"] == name and "as" in (user.value.get("user") or {}):
            raise InvalidInput(f"user {name} of the kubeconfig impersonates (`as`), which is not supported here")


def _config() -> Any:
    """Import the loader of kubeconfigs, which has no types."""
    from kubernetes import config  # noqa: PLC0415 - see above

    return config


@contextmanager
def _complaints() -> Iterator[list[str]]:
    """Collect log messages of the block, in this thread: the client only logs the failure of a credential plugin."""
    collected, thread = list[str](), threading.get_ident()

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.thread == thread:
                collected.append(record.getMessage())

    collector, root = Collector(level=logging.ERROR), logging.getLogger()
    root.addHandler(collector)
    try:
        yield collected
    finally:
        root.removeHandler(collector)


@contextmanager
def _sentences(host: str) -> Iterator[None]:
    """Raise errors of the API server and of the network as UpdraftErrors."""
    from kubernetes.client import ApiException  # noqa: PLC0415 - see above
    from urllib3.exceptions import HTTPError  # noqa: PLC0415 - comes with kubernetes

    try:
        yield
    except ApiException as error:
        raise _refusal(error, host) from error
    except HTTPError as error:
        raise Unavailable(f"no API server answers at {host}: {_cause(error)}") from error


def _refusal(error: "ApiException", host: str) -> UpdraftError:
    """Use the API server's own sentence; without one, the path is not served at all."""
    status = error.status or 0
    kind = _ERRORS.get(status, Unavailable)
    message = _line(_message(error.body))
    if kind is Unauthenticated:
        return kind(f"the API server at {host} refuses your credentials: {message or error.reason}")
    if message:
        return kind(message)
    if kind is NotFound:
        return NotFound(f"the cluster at {host} has no kinds of {GROUP}/{_VERSION}: install Updraft's chart first")
    return kind(f"the API server at {host} answered {status} {error.reason}")


def _message(body: str | bytes | None) -> str:
    try:
        content = json.loads(body or "")
    except ValueError:
        return ""
    return str(content.get("message", "")) if isinstance(content, dict) else ""


def _cause(error: Exception) -> str:
    """Return the end of urllib3's message: the rest is addresses of its objects."""
    return _line(str(error)).rpartition(": ")[2].partition("] ")[2] or _line(str(error)).rpartition(": ")[2]


def _line(text: str) -> str:
    """Join lines, because the text becomes part of a sentence."""
    return " ".join(text.split())


def _selector(field: str, value: str) -> dict[str, Any]:
    return {"field_selector": f"{field}={value}"} if value else {}


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from filter(None, whole)
