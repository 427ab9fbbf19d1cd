"""A real S3 server over a folder, built by `make bucket-server`."""

import signal
import subprocess
from pathlib import Path
from typing import Self

import httpx
from tests.support.ports import free_port
from tests.support.wait import wait_until
from tools.s3_server import BINARY, GO

MISSING = (
    ""
    if BINARY.exists()
    else "no S3 server: " + ("run `make bucket-server`" if GO else "it is built with Go, not here")
)
"""Why tests against a real bucket are skipped, in one line; empty if they are not."""


class S3Server:
    """A server over `folder`, with one bucket, `drafts`; killed when the block ends, and it may be started again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.bucket = folder / "data" / "drafts"
        self.url = "s3://drafts/fleet"
        self.environ = {
            "AWS_ACCESS_KEY_ID": "updraft",
            "AWS_SECRET_ACCESS_KEY": "only-for-tests",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._port}",
            "AWS_REGION": "us-east-1",
        }

    def start(self) -> None:
        self.bucket.mkdir(parents=True, exist_ok=True)
        (self._folder / "meta").mkdir(exist_ok=True)
        with (self._folder / "s3.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    BINARY,
                    *("--access", self.environ["AWS_ACCESS_KEY_ID"], "--secret", self.environ["AWS_SECRET_ACCESS_KEY"]),
                    *("--port", f"127.0.0.1:{self._port}", "--quiet"),
                    *("posix", "--sidecar", self._folder / "meta", self.bucket.parent),
                ],
                stdout=log,
                stderr=log,
            )
        wait_until(self._answers, what="the S3 server's first answer")

    def kill(self) -> None:
        """It is gone, and connections are refused."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """It accepts connections and answers nothing."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def objects(self) -> set[str]:
        """The names of all objects in the bucket."""
        return {str(path.relative_to(self.bucket)) for path in self.bucket.rglob("*") if path.is_file()}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _signal(self, signum: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(signum)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self._folder / "s3.log").read_text()
        try:
            return bool(httpx.get(self.environ["AWS_ENDPOINT_URL"]).status_code)
        except httpx.TransportError:
            return False
