"""Generated files: `make gen` writes them into the checkout, `make gen-check` (`--check`) only compares.

It compares with the files in the checkout, not with git, so it also finds uncommitted files and those whose source was removed.
"""

import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from tools import attacks, chart_reference, markdown, reference

from updraft_operator.api import crd

CHART = Path("charts/updraft")
CRDS = CHART / "files" / "crds"
PROTO_SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")


def main() -> None:
    """Write the files, or with `--check` print those that differ and exit with 1."""
    checkout = Path()
    if "--check" not in sys.argv[1:]:
        generate(checkout, checkout)
        return
    with tempfile.TemporaryDirectory() as folder:
        generate(checkout, Path(folder))
        stale = differences(Path(folder), checkout)
    if stale:
        sys.exit("\n".join(["generated files differ: run `make gen`", *stale]))


def generate(checkout: Path, into: Path) -> None:
    """Write every generated file below `into`, at the same path as in the checkout."""
    protos = checkout / "proto"
    out = into / "proto"
    out.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, "-m", "grpc_tools.protoc", f"-I{protos}", f"--python_out={out}", f"--grpc_python_out={out}"),
        *(f"--plugin={_plugin(name)}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")),
        *(f"--mypy_out=quiet:{out}", f"--mypy_grpc_out=quiet:{out}"),
        *(str(path) for path in sorted(protos.rglob("*.proto"))),
    ]
    subprocess.run(command, check=True)  # noqa: S603 - fixed words and our own paths
    reference.write(into / "docs" / "reference")
    attacks.write(checkout, into)
    (into / CHART).mkdir(parents=True, exist_ok=True)
    (into / CHART / "README.md").write_text(
        markdown.wrapped(chart_reference.readme(checkout / CHART)), encoding="utf-8"
    )
    crds = into / CRDS
    crds.mkdir(parents=True, exist_ok=True)
    for name, text in crd.files().items():
        (crds / name).write_text(text, encoding="utf-8")


def differences(fresh: Path, checkout: Path) -> list[str]:
    """Generated files that differ or exist in only one of the folders."""
    made, held = _generated(fresh), _generated(checkout)
    return sorted(name for name in made.keys() | held.keys() if made.get(name) != held.get(name))


def _generated(root: Path) -> dict[str, bytes]:
    code = (path for path in (root / "proto").rglob("*") if path.name.endswith(PROTO_SUFFIXES))
    pages = (root / "docs" / "reference").glob("*.md")
    crds = (root / CRDS).glob("*.yaml")
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in (*code, *pages, *crds, *(root / CHART).glob("README.md"), *root.glob(str(attacks.PAGE)))
    }


def _plugin(name: str) -> str:
    """The path of an installed script, which is not on PATH because packages are installed outside the checkout's .venv."""
    files = metadata.files("mypy-protobuf") or []
    return str(next(file.locate() for file in files if file.name == name))


if __name__ == "__main__":
    main()
