"""A real S3 server over a folder, built by `make bucket-server`."""

from pathlib import Path

import httpx
from tests.support.ports import free_port
from tests.support.processes import ServerProcess
from tests.support.wait import wait_until
from tools.s3_server import BINARY, GO

MISSING = (
    ""
    if BINARY.exists()
    else "no S3 server: " + ("run `make bucket-server`" if GO else "it is built with Go, not here")
)
"""Why tests against a real bucket are skipped, in one line; empty if they are not."""


class S3Server(ServerProcess):
    """A server over `folder`, with one bucket, `drafts`; killed when the block ends, and it may be started again."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._port = free_port()
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
            self._spawn(
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

    def objects(self) -> set[str]:
        """The names of all objects in the bucket."""
        return {str(path.relative_to(self.bucket)) for path in self.bucket.rglob("*") if path.is_file()}

    def _answers(self) -> bool:
        assert self.is_running, (self._folder / "s3.log").read_text()
        try:
            return bool(httpx.get(self.environ["AWS_ENDPOINT_URL"]).status_code)
        except httpx.TransportError:
            return False
