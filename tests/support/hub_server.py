"""A server on this machine that speaks what the Hugging Face library asks of the hub: a listing, heads, files and ranges."""

import hashlib
import io
import json
import re
import threading
from collections.abc import Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple, Self

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_only_for_tests"  # noqa: S105 - it opens nothing else

_BLOCK_BYTES = 1024 * 1024

_LISTING = re.compile(r"/api/models/(org/\w+)(?:/revision/(\w+))?")
_FILE = re.compile(rf"/(org/\w+)/resolve/{COMMIT}/(.+)")
_REVISIONS = (None, "main", "v1", COMMIT)


class Answer(NamedTuple):
    """What is sent."""

    status: int
    content: bytes | Path
    headers: dict[str, str]

    @property
    def size_bytes(self) -> int:
        return _size(self.content)


class HubServer:
    """Two repositories of the same files, with a tag v1: org/public, and org/gated for those with TOKEN.

    `asked` are the files that were sent, whole or in part, and `fails_at` is one that is not. `num_bytes` were sent of all
    files; above `stops_after`, nothing more is sent until `ends` is set.
    """

    def __init__(self, files: Mapping[str, bytes | Path]) -> None:
        self.files = files
        self.asked: list[str] = []
        self.fails_at = ""
        self.has_ranges = True
        self.num_bytes = 0
        self.stops_after: int | None = None
        self.ends = threading.Event()
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
            {"rfilename": name, "size": _size(content), "blobId": _oid(content)} for name, content in self.files.items()
        ]
        about = {"_id": "1", "id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings}
        return Answer(200, json.dumps(about).encode(), {"Content-Type": "application/json"})

    def waits(self) -> bool:
        """Whether nothing more is to be sent for now."""
        return self.stops_after is not None and self.num_bytes >= self.stops_after

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
        self.ends.set()
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
        begin, end, status = 0, answer.size_bytes, answer.status
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "")
        if asked and status == 200 and self.hub.has_ranges:
            begin, end, status = int(asked[1]), min(int(asked[2]) + 1, end), 206
            answer.headers["Content-Range"] = f"bytes {begin}-{end - 1}/{answer.size_bytes}"
        self.send_response(status)
        for name, value in {**answer.headers, "Content-Length": str(end - begin)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            with suppress(ConnectionError):
                self._send_range(answer.content, begin, end)

    def _send_range(self, content: bytes | Path, begin: int, end: int) -> None:
        with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
            file.seek(begin)
            while begin < end:
                if self.hub.waits():
                    self.hub.ends.wait()
                block = file.read(min(end - begin, _BLOCK_BYTES))
                self.wfile.write(block)
                begin += len(block)
                self.hub.num_bytes += len(block)


def _refusal(status: int, code: str) -> Answer:
    return Answer(status, b"", {"X-Error-Code": code, "X-Error-Message": code})


def _size(content: bytes | Path) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _oid(content: bytes | Path) -> str:
    if isinstance(content, Path):  # which may have no end
        content = f"{content.name} {_size(content)}".encode()
    return hashlib.sha1(content).hexdigest()  # noqa: S324 - as git names what it keeps
