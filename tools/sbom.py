"""A CycloneDX bill of materials of each image, from its lock: names, versions, hashes and package URLs.

`make sbom` writes dist/sbom/IMAGE.cdx.json. The base image and its Debian packages are not in it: they are known where the
image is built (`syft IMAGE`, for example).
"""

import argparse
import os
import subprocess
import tempfile
import tomllib
from pathlib import Path

from tools import locks

SPEC = "1.6"
DEFAULT = Path("dist/sbom")


def main() -> None:
    """Write all of them, validated against CycloneDX's schema. CalledProcessError, after its own words, if one is not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--into", type=Path, default=DEFAULT, help="folder of the files")
    into: Path = parser.parse_args().into
    into.mkdir(parents=True, exist_ok=True)
    for image in locks.EXTRAS:
        write(image, into / f"{image}.cdx.json")


def write(image: str, file: Path) -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    with tempfile.TemporaryDirectory() as folder:
        about = Path(folder, "pyproject.toml")
        fields = "\n".join(f'{name} = "{project[name]}"' for name in ("version", "description"))
        about.write_text(f'[project]\nname = "updraft-{image}"\n{fields}\n', encoding="utf-8")
        command = [
            *(
                str(locks.program("python")),
                "-W",
                "ignore",
                "-m",
                "cyclonedx_py",
            ),  # it warns of a graph, which locks have not
            *("requirements", str(locks.FOLDER / f"{image}.lock")),
            *("--pyproject", str(about), "--mc-type", "application", "--sv", SPEC, "--of", "JSON"),
            *("--output-reproducible", "--validate", "-o", str(file)),
        ]
        # Without pip's settings of this machine, such as an index: the bill must not tell where it was written.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
        subprocess.run(command, check=True, env={**environment, "PIP_CONFIG_FILE": os.devnull})  # noqa: S603 - a pinned program


if __name__ == "__main__":
    main()
