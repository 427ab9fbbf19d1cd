"""The ways in: a small REST client of the API server, kubectl, and the audit log.

The client says what the API server says and nothing else (no cache, no retry, no model of any resource), so that a
test about the API server's behaviour sees that behaviour.
"""

import base64
import json
import os
import ssl
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import yaml
from tests.cluster import programs

Json = dict[str, Any]
_TIMEOUT_S = 30.0


class ApiError(Exception):
    """The API server refused: the HTTP `code`, its `reason` (NotFound, Forbidden, Invalid, ...) and its message."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(f"{code} {reason}: {message}")
        self.code = code
        self.reason = reason
        self.message = message


class Api:
    """A client of the API server as one user; close it, or use it in a with block."""

    def __init__(self, kubeconfig: Path, *, user: str = "", groups: Sequence[str] = ()) -> None:
        """Impersonate `user` in `groups` when one is given, as `kubectl --as` does."""
        config = yaml.safe_load(kubeconfig.read_text())
        cluster, self._token = config["clusters"][0]["cluster"], config["users"][0]["user"]["token"]
        authority = base64.b64decode(cluster["certificate-authority-data"]).decode()
        headers = [("Authorization", f"Bearer {self._token}")]
        if user:
            headers += [("Impersonate-User", user), *(("Impersonate-Group", group) for group in groups)]
        self._client = httpx.Client(
            base_url=cluster["server"],
            headers=headers,
            verify=ssl.create_default_context(cadata=authority),
            timeout=_TIMEOUT_S,
            trust_env=False,  # a proxy of the machine's knows no address of this cluster
        )

    def get(self, path: str, **query: str) -> Json:
        """An object or a list of them."""
        return self._call("GET", path, query=query)

    def create(self, path: str, body: Json) -> Json:
        """POST to a collection."""
        return self._call("POST", path, body=body)

    def patch(self, path: str, body: Json) -> Json:
        """Merge `body` into the object (a JSON merge patch; it works on every resource and subresource)."""
        return self._call("PATCH", path, body=body, kind="application/merge-patch+json")

    def apply(self, path: str, body: Json, *, manager: str, force: bool = False) -> Json:
        """Server-side apply as a field manager."""
        query = {"fieldManager": manager, "force": str(force).lower()}
        return self._call("PATCH", path, body=body, kind="application/apply-patch+yaml", query=query)

    def delete(self, path: str, **query: str) -> Json:
        """Delete an object or a whole collection."""
        return self._call("DELETE", path, query=query)

    def text(self, path: str, **query: str) -> str:
        """What is no JSON: logs, /readyz, /metrics."""
        return self._send("GET", path, query=query).text

    def exists(self, path: str) -> bool:
        """Whether a GET finds it."""
        try:
            self.get(path)
        except ApiError as error:
            if error.code == httpx.codes.NOT_FOUND:
                return False
            raise
        return True

    def close(self) -> None:
        """End its connections."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(
        self,
        method: str,
        path: str,
        *,
        body: Json | None = None,
        kind: str = "application/json",
        query: dict[str, str] | None = None,
    ) -> Json:
        answer: Json = self._send(method, path, body=body, kind=kind, query=query).json()
        return answer

    def _send(
        self,
        method: str,
        path: str,
        *,
        body: Json | None = None,
        kind: str = "application/json",
        query: dict[str, str] | None = None,
    ) -> httpx.Response:
        content = None if body is None else json.dumps(body)
        headers = {} if body is None else {"Content-Type": kind}
        response = self._client.request(method, path, content=content, headers=headers, params=query)
        if response.is_error:
            raise _error(response)
        return response


def succeeds(call: Callable[[], object]) -> bool:
    """Whether the API server does what is asked.

    Not yet: a custom resource whose storage is made ready (404, then 429), a role that is not known (403).
    """
    try:
        call()
    except ApiError:
        return False
    return True


def _error(response: httpx.Response) -> ApiError:
    try:
        status = response.json()
    except ValueError:
        status = {}
    return ApiError(response.status_code, status.get("reason", ""), status.get("message", response.text))


def kubectl(kubeconfig: Path, *words: str, stdin: str | None = None) -> str:
    """Run kubectl and return what it prints; raise AssertionError with its complaint when it fails."""
    result = subprocess.run(
        [programs.path("kubectl"), *words],
        env={**os.environ, "KUBECONFIG": str(kubeconfig)},
        input=stdin,
        text=True,
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, f"kubectl {' '.join(words)}: {result.stderr or result.stdout}"
    return result.stdout


@dataclass(frozen=True, slots=True, kw_only=True)
class Audited:
    """One request, as the audit log has it; names are empty where a request has none."""

    verb: str
    user: str
    """The impersonated one, if any."""
    group: str
    resource: str
    """With the subresource: deployments, deployments/scale."""
    namespace: str
    name: str
    code: int
    agent: str
    time: str
    """When it was received, RFC 3339 in UTC."""


def audited(path: Path) -> Iterator[Audited]:
    """Every request answered so far, oldest first."""
    return iter(_audit_log(path).read())


class _AuditLog:
    """Tests ask again and again whether something was requested: each look reads only what came since the last one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._num_read_bytes = 0
        self._told: list[Audited] = []

    def read(self) -> list[Audited]:
        """All of it; the last line may be half written, and is left for the next look."""
        with self._path.open("rb") as log:
            log.seek(self._num_read_bytes)
            new = log.read()
        *lines, rest = new.split(b"\n")
        self._num_read_bytes += len(new) - len(rest)
        self._told.extend(_request(json.loads(line)) for line in lines)
        return self._told


@cache
def _audit_log(path: Path) -> _AuditLog:
    """One for each file; a control plane's has a place of its own."""
    return _AuditLog(path)


def _request(event: Json) -> Audited:
    user = event.get("impersonatedUser") or event["user"]
    target = event.get("objectRef", {})
    resource = "/".join(word for word in (target.get("resource", ""), target.get("subresource", "")) if word)
    return Audited(
        verb=event["verb"],
        user=user.get("username", ""),
        group=target.get("apiGroup", ""),
        resource=resource,
        namespace=target.get("namespace", ""),
        name=target.get("name", ""),
        code=event.get("responseStatus", {}).get("code", 0),
        agent=event.get("userAgent", ""),
        time=event["requestReceivedTimestamp"],
    )
