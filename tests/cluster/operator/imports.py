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
from updraft_operator.watching.cluster import KINDS


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
    done = _run(said, registry, folder, target)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    return (folder / "result").read_text()


def refused_as_the_job(said: list[str], registry: RegistryProcess, folder: Path, *, target: Path | None = None) -> str:
    """Run the Job's own command with a draft that it refuses; return its last words."""
    done = _run(said, registry, folder, target)
    assert done.returncode != 0, done.stdout
    return done.stderr.strip().splitlines()[-1].removeprefix("Error: ")


def _run(
    said: list[str], registry: RegistryProcess, folder: Path, target: Path | None
) -> subprocess.CompletedProcess[str]:
    words = list(said[1:])
    here = {"--registry": registry.address, "--result": str(folder / "result")}
    if target is not None:
        here["--target"] = str(target)
    for name, value in here.items():
        words[words.index(name) + 1] = value
    for name in {"--token-file", "--target"} - set(here):
        if name in words:
            del words[words.index(name) : words.index(name) + 2]
    words[words.index("import") + 1] = str(folder)
    return subprocess.run([sys.executable, "-m", "updraft_cli", *words], capture_output=True, text=True, check=False)


def fail(subject: Subject, pod: Json, words: str) -> None:
    """Let the pod of a Job end badly with these last words, and the Job make no other."""
    (owner,) = pod["metadata"]["ownerReferences"]
    subject.api.patch(subject.path("Job", owner["name"]), {"spec": {"backoffLimit": 0}})
    subject.set_pod(pod["metadata"]["name"], ended(pod, words, code=1))


def apply_import(subject: Subject, name: str, **spec: object) -> Json:
    """Import a draft, as a person does."""
    body: Json = {
        "apiVersion": names.API_VERSION,
        "kind": "DraftImport",
        "metadata": {"name": name},
        "spec": {"speculatorRef": {"name": subject.name}, "uri": f"hf://org/{name}", **spec},
    }
    return subject.api.create(KINDS["DraftImport"].path(subject.namespace), body)


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
