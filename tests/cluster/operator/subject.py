"""A speculator under test: the resource, what is made of it, and what stands in for a kubelet."""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from tests.cluster.access import Api, ApiError, Json
from tests.support.wait import LONG_S, wait_until

from updraft_operator.api import names
from updraft_operator.watching.cluster import CHILDREN, KINDS, RESOURCES

MODEL = "/models/target"


class Subject:
    """One AdaptiveSpeculator and its objects, as the administrator sees and changes them."""

    def __init__(self, api: Api, namespace: str, name: str) -> None:
        self.api = api
        self.namespace = namespace
        self.name = name

    def create(self, **spec: Any) -> Json:
        """Make the resource: the least one, and what is said more."""
        body = {
            "apiVersion": names.API_VERSION,
            "kind": "AdaptiveSpeculator",
            "metadata": {"name": self.name},
            "spec": {"targetModel": {"uri": MODEL}, **spec},
        }
        return self.api.create(KINDS["AdaptiveSpeculator"].path(self.namespace), body)

    def change(self, **spec: Any) -> Json:
        """Merge into the spec; None takes away."""
        return self.api.patch(self.path(), {"spec": spec})

    def delete(self) -> None:
        self.api.delete(self.path())

    def path(self, kind: str = "AdaptiveSpeculator", name: str = "", subresource: str = "") -> str:
        """Of the resource, or of an object of its namespace."""
        resource = RESOURCES[kind]
        return resource.path(self.namespace, name or self.name, subresource)

    def get(self, kind: str = "AdaptiveSpeculator", name: str = "") -> Json:
        return self.api.get(self.path(kind, name))

    def find(self, kind: str, name: str = "") -> Json | None:
        """None where there is none."""
        try:
            return self.get(kind, name)
        except ApiError as error:
            if error.code != 404:
                raise
            return None

    def exists(self, kind: str = "AdaptiveSpeculator", name: str = "") -> bool:
        return self.find(kind, name) is not None

    def all_of(self, kind: str, **labels: str) -> list[Json]:
        """All of a kind in the namespace with these labels."""
        resource = RESOURCES[kind]
        query = {"labelSelector": ",".join(f"{name}={value}" for name, value in labels.items())} if labels else {}
        return list(self.api.get(resource.path(self.namespace), **query)["items"])

    def objects(self) -> dict[tuple[str, str], Json]:
        """All that the operator made for it, by kind and name."""
        ours = {names.SPECULATOR: self.name, names.MANAGED_BY: names.MANAGER}
        return {
            (kind, each["metadata"]["name"]): each
            for kind in (*CHILDREN, "Secret", "DraftVersion")
            for each in self.all_of(kind, **ours)
        }

    def conditions(self) -> dict[str, Json]:
        """By type; none while the resource is not there."""
        found = self.find("AdaptiveSpeculator") or {}
        return {each["type"]: each for each in found.get("status", {}).get("conditions", ())}

    def condition(self, kind: str) -> tuple[str, str]:
        """Status and reason."""
        found = self.conditions().get(kind, {})
        return found.get("status", ""), found.get("reason", "")

    def wait_for(self, kind: str, status: str, reason: str, *, timeout_s: float = LONG_S) -> str:
        """Return the condition's message once it says so."""
        try:
            wait_until(lambda: self.condition(kind) == (status, reason), timeout_s=timeout_s)
        except TimeoutError:
            raise AssertionError(f"{kind} is no {status} {reason}, but {self.conditions().get(kind)}") from None
        return str(self.conditions()[kind]["message"])

    def wait_until_built(self) -> None:
        """Until the objects are there and their conditions tell of this spec."""
        wait_until(self._is_built, what=f"the objects of {self.name}")

    def _is_built(self) -> bool:
        found = self.find("AdaptiveSpeculator")
        if found is None or found.get("status", {}).get("observedGeneration") != found["metadata"]["generation"]:
            return False
        return self.exists("Deployment", f"{self.name}-serving")

    def wait_until_gone(self) -> None:
        """Until nothing is left of the resource and of what was made for it."""
        try:
            wait_until(lambda: not self.exists() and not self.objects())
        except TimeoutError:
            told = ("uid", "creationTimestamp", "deletionTimestamp", "finalizers", "ownerReferences")
            left = {
                each: {name: content["metadata"].get(name) for name in told} for each, content in self.objects().items()
            }
            raise AssertionError(f"{self.name} exists: {self.exists()}, and of its objects: {left}") from None

    # What a kubelet would do.

    def pods(self, part: str) -> list[Json]:
        """Of a part, made by Kubernetes' controllers."""
        return self.all_of("Pod", **names.selector(self.name, part))

    def run(self, part: str, num_pods: int = 1) -> None:
        """Let the pods of a part be ready, as soon as they are there."""

        def told() -> bool:
            found = [pod for pod in self.pods(part) if "deletionTimestamp" not in pod["metadata"]]
            for pod in found:
                self.set_pod(pod["metadata"]["name"], running(pod))
            return len(found) >= num_pods

        wait_until(told, what=f"{num_pods} pods of {self.name}-{part}")

    def set_pod(self, name: str, status: Mapping[str, Any]) -> None:
        """Write a pod's status, as its kubelet does."""
        self.api.patch(self.path("Pod", name, "status"), {"status": dict(status)})

    def events(self) -> Iterator[tuple[str, str]]:
        """Reasons and messages of the Events about the resource and its versions, in no order."""
        for each in self.all_of("Event"):
            if (
                each["involvedObject"]["name"].startswith(self.name)
                and each["source"].get("component") == names.MANAGER
            ):
                yield each["reason"], each["message"]


def running(pod: Json) -> Json:
    """The status of a pod that is ready."""
    since = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    return {
        "phase": "Running",
        "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": since}],
        "containerStatuses": [
            {
                "name": each["name"],
                "image": each["image"],
                "imageID": "",
                "ready": True,
                "started": True,
                "restartCount": 0,
                "state": {"running": {"startedAt": since}},
            }
            for each in pod["spec"]["containers"]
        ],
    }
