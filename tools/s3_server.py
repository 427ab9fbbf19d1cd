"""Builds the S3 server that tests of buckets start: versitygw (Apache-2.0), with Go, once a version.

`python -m tools.s3_server`, called by `make bucket-server`. Without Go there is none, and those tests are skipped.
"""

import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

VERSION = "1.8.0"
BINARY = (
    Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "updraft" / f"versitygw-{VERSION}" / "versitygw"
)
GO = shutil.which("go") or shutil.which("/usr/local/go/bin/go")


def build() -> None:
    """Build the server unless it is there; another process that builds it is waited for."""
    if GO is None:
        print("Go is not installed: the tests against a real S3 server are skipped")
        return
    BINARY.parent.mkdir(parents=True, exist_ok=True)
    with (BINARY.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if BINARY.exists():
            return
        print(f"Building versitygw {VERSION} into {BINARY.parent} (once; about 2 minutes) ...", flush=True)
        with tempfile.TemporaryDirectory(dir=BINARY.parent) as folder:
            subprocess.run(  # noqa: S603 - our own arguments
                [
                    GO,
                    "install",
                    "-trimpath",
                    "-ldflags=-s -w",
                    f"github.com/versity/versitygw/cmd/versitygw@v{VERSION}",
                ],
                env={**os.environ, "GOBIN": folder, "CGO_ENABLED": "0"},
                check=True,
            )
            (Path(folder) / "versitygw").replace(BINARY)


if __name__ == "__main__":
    build()
