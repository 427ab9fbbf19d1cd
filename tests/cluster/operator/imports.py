"""The pod of an import's Job: its command runs here, and its kubelet is the test."""

import json
import subprocess
import sys
from pathlib import Path

from tests.cluster.access import Json
from tests.cluster.operator import requests
from tests.cluster.operator.subject import Subject
from tests.support.registry import RegistryProcess
from tests.support.wait import wait_until

from updraft_operator.api import names


def job_pod(subject: Subject) -> Json:
    """The pod of the import that has not ended, once there is one."""

    def pending() -> list[Json]:
        return [pod for pod in subject.pods(names.IMPORT) if pod["status"]["phase"] == "Pending"]

    wait_until(lambda: bool(pending()), what="the pod of an import's Job")
    (pod,) = pending()
    return pod


def command(pod: Json) -> list[str]:
    """The command of the Job's container."""
    (container,) = pod["spec"]["containers"]
    return [*container["command"], *container["args"]]


def as_the_job(said: list[str], registry: RegistryProcess, folder: Path, *, target: Path | None = None) -> str:
    """Run the Job's own command, with what is elsewhere outside of a cluster; return what it leaves to the operator.

    Without `target` the draft's folder has to say for which target it is.
    """
    words, result = list(said[1:]), folder / "result"
    here = {"--registry": registry.address, "--result": str(result)}
    if target is not None:
        here["--target"] = str(target)
    for name, value in here.items():
        words[words.index(name) + 1] = value
    for name in {"--token-file", "--target"} - set(here):
        if name in words:
            del words[words.index(name) : words.index(name) + 2]
    words[words.index("import") + 1] = str(folder)
    done = subprocess.run([sys.executable, "-m", "updraft_cli", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    return result.read_text()


def ended(pod: Json, message: str, *, code: int = 0) -> Json:
    """The status of a pod whose container ended with these last words."""
    since = requests.now().partition(".")[0] + "Z"
    (container,) = pod["spec"]["containers"]
    state = {"exitCode": code, "message": message, "startedAt": since, "finishedAt": since, "reason": "Completed"}
    return {
        "phase": "Failed" if code else "Succeeded",
        "containerStatuses": [
            {
                "name": container["name"],
                "image": container["image"],
                "imageID": "",
                "ready": False,
                "restartCount": 0,
                "state": {"terminated": state},
            }
        ],
    }
