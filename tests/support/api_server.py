"""An API server for our kinds and pods, small enough for a test: get, list, watch and merge-patch, without any checks."""

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Condition, Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

Json = dict[str, Any]

_PATH = re.compile(r"/apis/updraft\.dev/v1alpha1/(?:namespaces/([^/]+)/)?(\w+)(?:/([^/]+))?")


@dataclass
class ApiServer:
    """Objects by plural and name; `changes` of AdaptiveSpeculators go to watches."""

    kubeconfig: Path
    objects: dict[str, dict[str, Json]] = field(default_factory=dict)
    events: list[Json] = field(default_factory=list)
    pods: list[Json] = field(default_factory=list)
    metrics: dict[str, str] = field(default_factory=dict)
    """Metrics by `pod:port`."""
    is_reader: bool = False
    """The user may not patch, and may not see pods."""
    reviews: list[Json] = field(default_factory=list)
    """What the user asked to be allowed."""
    tokens: list[str] = field(default_factory=list)
    """ServiceAccounts of which a token was asked for."""
    token_life_s: float = 3600.0
    authorities: dict[str, str] = field(default_factory=dict)
    """`ca.crt` of ConfigMaps by name."""
    patches: list[Json] = field(default_factory=list)
    changes: list[Json] = field(default_factory=list)
    changed: Condition = field(default_factory=Condition)

    def put(self, plural: str, content: Json) -> None:
        """Store an object, and tell the watches."""
        with self.changed:
            self.objects.setdefault(plural, {})[content["metadata"]["name"]] = content
            self.changes.append({"type": "MODIFIED", "object": deepcopy(content)})
            self.changed.notify_all()


@contextmanager
def api_server(folder: Path) -> Iterator[ApiServer]:
    """Run one for the length of a block; its kubeconfig names the namespace `team`."""
    state = ApiServer(kubeconfig=folder / "kubeconfig")
    handler = type("Handler", (_Handler,), {"state": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    state.kubeconfig.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
                "users": [{"name": "u", "user": {"token": "t"}}],
                "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": "team"}}],
                "current-context": "x",
            }
        )
    )
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: ApiServer

    def do_GET(self) -> None:
        path, query = self._parsed()
        if path.path.endswith("/events"):
            kind = query["fieldSelector"].partition("=")[2]
            items = [event for event in self.state.events if event["involvedObject"]["kind"] == kind]
            self._answer({"items": items})
            return
        if "/pods" in path.path:
            self._pods(path.path)
            return
        if "/configmaps/" in path.path:
            self._config_map(path.path.rpartition("/")[2])
            return
        match = _PATH.fullmatch(path.path)
        assert match is not None
        _, plural, name = match.groups()
        objects = self.state.objects.get(plural, {})
        if name is not None:
            self._answer(objects[name]) if name in objects else self._refuse(404, f"{plural} {name} not found")
        elif "watch" in query:
            self._watch(int(query["resourceVersion"]), int(query["timeoutSeconds"]))
        else:
            items = [content for content in objects.values() if _is_selected(content, query.get("fieldSelector", ""))]
            self._answer({"items": items, "metadata": {"resourceVersion": str(len(self.state.changes))}})

    def do_POST(self) -> None:
        if self.path.endswith("/token"):
            self._token(self.path.split("/")[-2])
            return
        assert self.path == "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", self.path
        review = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.state.reviews.append(review["spec"]["resourceAttributes"])
        self._answer({**review, "status": {"allowed": not self.state.is_reader}})

    def do_PATCH(self) -> None:
        path, query = self._parsed()
        if self.state.is_reader:
            self._refuse(403, 'adaptivespeculators.updraft.dev "qwen" is forbidden')
            return
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        match = _PATH.fullmatch(path.path)
        assert match is not None
        _, plural, name = match.groups()
        assert name is not None
        content = _merged(self.state.objects[plural][name], body)
        self.state.patches.append(body)
        if "dryRun" not in query:
            self.state.put(plural, content)
        self._answer(content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name of the standard library
        pass

    def _token(self, account: str) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.state.tokens.append(account)
        if self.state.is_reader:
            self._refuse(403, 'serviceaccounts "qwen" is forbidden')
            return
        expires = datetime.fromtimestamp(time.time() + self.state.token_life_s, UTC).isoformat()
        status = {"token": f"token-{len(self.state.tokens)}", "expirationTimestamp": expires}
        self._answer({"spec": {"audiences": []}, "status": status})

    def _config_map(self, name: str) -> None:
        if name in self.state.authorities:
            self._answer({"metadata": {"name": name}, "data": {"ca.crt": self.state.authorities[name]}})
        else:
            self._refuse(404, f"configmaps {name} not found")

    def _pods(self, path: str) -> None:
        name, _, rest = unquote(path.partition("/pods")[2].removeprefix("/")).partition("/")
        if self.state.is_reader:
            self._refuse(403, "pods is forbidden")
        elif not name:
            self._answer({"items": self.state.pods})
        elif rest == "proxy/metrics" and name in self.state.metrics:
            self._send_text(self.state.metrics[name])
        else:
            self._refuse(404, f"pods {name} not found")

    def _parsed(self) -> tuple[Any, dict[str, str]]:
        parts = urlsplit(self.path)
        return parts, {name: values[0] for name, values in parse_qs(parts.query).items()}

    def _watch(self, start: int, within_s: int) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        with self.state.changed:
            self.state.changed.wait_for(lambda: len(self.state.changes) > start, timeout=within_s)
            lines = [json.dumps(change) + "\n" for change in self.state.changes[start:]]
        self.wfile.write("".join(lines).encode())

    def _answer(self, content: Json) -> None:
        self._send(200, content)

    def _refuse(self, code: int, message: str) -> None:
        self._send(code, {"kind": "Status", "code": code, "message": message})

    def _send_text(self, text: str) -> None:
        self._send_body(200, text.encode(), "text/plain")

    def _send(self, code: int, content: Json) -> None:
        self._send_body(code, json.dumps(content).encode(), "application/json")

    def _send_body(self, code: int, body: bytes, kind: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _is_selected(content: Json, selector: str) -> bool:
    path, _, value = selector.partition("=")
    found: Any = content
    for part in filter(None, path.split(".")):
        found = found[part]
    return not selector or found == value


def _merged(content: Any, patch: Any) -> Any:
    """Apply a merge patch (RFC 7386)."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(content) if isinstance(content, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = _merged(merged.get(name), value)
    return merged
