"""`python -m tests.cluster build | up | down`: what `make cluster-build`, `cluster-up` and `cluster-down` run."""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time

from tests.cluster import cluster, programs
from tests.cluster.build import BuildError, build, find_go
from tests.cluster.cluster import ClusterError
from tests.cluster.daemon import StartError

TRIAL = programs.CACHE / "cluster-trial"
"""The folder of the cluster that `up` starts and `down` ends; tests start theirs in temporary folders."""


def main() -> None:
    """Run the verb; what is missing is one sentence and exit status 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description=__doc__)
    parser.add_argument("verb", choices=("build", "up", "down"))
    verbs = {"build": _build, "up": _up, "down": _down}
    try:
        verbs[parser.parse_args().verb]()
    except (BuildError, ClusterError, StartError, programs.MissingProgramError) as error:
        sys.exit(str(error))


def _build() -> None:
    _install_packages()
    build(_tell, go=find_go(), folder=programs.binaries())


def _install_packages() -> None:
    """With root, install what the node needs; without it say so: the control plane alone can run all the same."""
    packages = cluster.missing_packages()
    if not packages:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        _tell(f"For the node (not for the control plane) install as root: apt-get install {' '.join(packages)}")
        return
    _tell(f"Installing Debian packages: {' '.join(packages)} ...")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
        subprocess.run(["apt-get", "-qq", *words], env=environment, check=True, stdout=subprocess.DEVNULL)


def _up() -> None:
    if cluster.is_up(TRIAL):
        _tell("The cluster is up already; `make cluster-down` ends it.")
    else:
        cluster.make_room()
        cluster.down(TRIAL)  # what is left of one that was cut off
        TRIAL.mkdir(parents=True)
        started = time.monotonic()
        cluster.up(TRIAL, is_detached=True)
        _tell(f"Node Ready after {time.monotonic() - started:.1f} s; logs are in {TRIAL}. In your shell:")
    kubeconfig = cluster.Cluster(folder=TRIAL, has_controllers=True).kubeconfig
    _tell(f"export KUBECONFIG={shlex.quote(str(kubeconfig))} PATH={shlex.quote(str(programs.binaries()))}:$PATH")


def _down() -> None:
    cluster.down(TRIAL)
    _tell("The cluster is down, and nothing of it is left.")


def _tell(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - what a command prints is what it is for


if __name__ == "__main__":
    main()
