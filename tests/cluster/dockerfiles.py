"""Images built from Dockerfiles by buildah: no engine, no registry, nothing written outside the builder's folder.

A base image must be in the folder already (`FROM scratch` needs none). What a Dockerfile's RUN installs comes through
the machine's own settings of pip and its certificates, shown during the build only.
"""

import os
import secrets
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.private import FOLDER
from tests.cluster.programs import CHECKOUT

_FROM_MACHINE = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pip.conf")


class ImageError(Exception):
    """buildah failed; the message has its last words."""


@dataclass(frozen=True, slots=True)
class Builder:
    """Builds and keeps images in `folder`."""

    folder: Path

    def build(
        self,
        context: Path,
        reference: str,
        *,
        dockerfile: str = "Dockerfile",
        arguments: Mapping[str, str] | None = None,
    ) -> None:
        """Build `context/dockerfile` as `reference`, with build arguments; layers that are unchanged are reused."""
        context = context.resolve()
        shown = [f"--volume={path}:{path}:ro" for path in _FROM_MACHINE if Path(path).exists()]
        given = [f"--build-arg={name}={value}" for name, value in (arguments or {}).items()]
        options = ["--isolation=chroot", "--pull=never", "--format=docker", "--layers", "--force-rm"]
        self.buildah(
            "build", *options, *shown, *given, f"--file={context / dockerfile}", f"--tag={reference}", str(context)
        )

    def save(self, reference: str, archive: Path) -> None:
        """Write the image as an archive that `Cluster.load` takes."""
        part = self.folder / f"{secrets.token_hex(4)}.tar"
        try:
            self.buildah("push", "--quiet", reference, f"docker-archive:{FOLDER / part.name}:{reference}")
            part.rename(archive)
        finally:
            part.unlink(missing_ok=True)

    def has(self, reference: str) -> bool:
        """Whether the folder has the image."""
        return self.buildah("images", "--quiet", f"--filter=reference={reference}") != ""

    def buildah(self, verb: str, *words: str) -> str:
        """Run buildah and return what it prints; raise ImageError when it fails."""
        self.folder.mkdir(parents=True, exist_ok=True)
        policy, registries = self.folder / "policy.json", self.folder / "registries.conf"
        _show(policy, '{"default": [{"type": "insecureAcceptAnything"}]}')
        _show(registries, 'unqualified-search-registries = ["docker.io"]\n')
        signed = [f"--signature-policy={FOLDER / policy.name}"] if verb in {"build", "push"} else []
        storage = [f"--root={FOLDER / 'storage'}", "--runroot=/run/storage", "--storage-driver=overlay"]
        return self.run("buildah", *storage, verb, *signed, *words)

    def run(self, *command: str | Path) -> str:
        """Run a command that sees the folder at private.FOLDER, and whose writes elsewhere are seen by nobody."""
        (self.folder / "tmp").mkdir(parents=True, exist_ok=True)
        result = subprocess.run(
            ["unshare", "--mount", sys.executable, "-m", "tests.cluster.private", self.folder, *command],
            env={
                **os.environ,
                "TMPDIR": str(FOLDER / "tmp"),
                "CONTAINERS_REGISTRIES_CONF": str(FOLDER / "registries.conf"),
            },
            cwd=CHECKOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            capture_output=True,
            check=False,
        )
        if result.returncode != 0:
            raise ImageError(f"{command[0]} failed:\n{(result.stderr or result.stdout)[-3000:]}")
        return result.stdout


def _show(path: Path, text: str) -> None:
    """Write a file that another builder may be reading; whoever reads it finds all of it."""
    if not path.exists() or path.read_text() != text:
        part = path.with_suffix(f".{secrets.token_hex(4)}")
        part.write_text(text)
        part.rename(path)
