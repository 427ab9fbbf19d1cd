"""A server on this machine that speaks what the Hugging Face library asks of the hub: a listing, heads, whole files."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple, Self

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_only_for_tests"  # noqa: S105 - it opens nothing else

_LISTING = re.compile(r"/api/models/(org/\w+)(?:/revision/(\w+))?")
_FILE = re.compile(rf"/(org/\w+)/resolve/{COMMIT}/(.+)")
_REVISIONS = (None, "main", "v1", COMMIT)


class Answer(NamedTuple):
    """What is sent."""

    status: int
    content: bytes
    headers: dict[str, str]


class HubServer:
    """Two repositories of the same files, with a tag v1: org/public, and org/gated for those with TOKEN.

    `asked` are the files that were sent, and `fails_at` is one that is not.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.asked: list[str] = []
        self.fails_at = ""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._thread = threading.Thread(target=self._server.serve_forever)

    @property
    def url(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def answer(self, method: str, path: str, authorization: str | None) -> Answer:
        """What the hub answers."""
        listing, file = _LISTING.fullmatch(path), _FILE.fullmatch(path)
        repository = (listing or file or ("", ""))[1]
        if repository == "org/gated" and authorization != f"Bearer {TOKEN}":
            return _refusal(403, "GatedRepo")
        if repository not in {"org/public", "org/gated"}:
            return _refusal(401, "RepoNotFound")
        if listing:
            return self._listing(repository) if listing[2] in _REVISIONS else _refusal(404, "RevisionNotFound")
        assert file is not None
        return self._file(method, file[2])

    def _listing(self, repository: str) -> Answer:
        siblings = [
            {"rfilename": name, "size": len(content), "blobId": _oid(content)} for name, content in self.files.items()
        ]
        about = {"_id": "1", "id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings}
        return Answer(200, json.dumps(about).encode(), {"Content-Type": "application/json"})

    def _file(self, method: str, name: str) -> Answer:
        if method == "GET":
            if name == self.fails_at:
                return _refusal(400, "Broken")
            self.asked.append(name)
        content = self.files[name]
        return Answer(200, content, {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": COMMIT})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def do_HEAD(self) -> None:
        self._send()

    def do_GET(self) -> None:
        self._send()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        """Nothing: a test's output is its own."""

    def _send(self) -> None:
        answer = self.hub.answer(self.command, self.path.partition("?")[0], self.headers["Authorization"])
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(answer.content)


def _refusal(status: int, code: str) -> Answer:
    return Answer(status, b"", {"X-Error-Code": code, "X-Error-Message": code})


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()  # noqa: S324 - as git names what it keeps
