"""Three tensors of a checkpoint of 230 GB, from a real server with range support, as `updraft model pull --head-only` fetches
them: once without a disturbance, and once killed half-way."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.support import huge_checkpoint
from tests.support.hub_server import HubServer

TIMEOUT_S = 120.0
_WRITTEN_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadRun:
    """Bytes that the server sent in total, of all files."""

    checkpoint_bytes: int
    tensors_bytes: int
    sent_bytes: int
    sent_bytes_killed: int
    """By the download that was killed, and the one that went on."""
    arrived_bytes: int
    """On disk when it was killed."""
    seconds: float


def run(folder: Path, hidden: int) -> HeadRun:
    files = huge_checkpoint.make(folder / "huge", hidden)
    num_bytes = huge_checkpoint.tensors_bytes(hidden)
    with HubServer(files) as hub:
        began_s = time.perf_counter()
        _pull(hub, folder / "whole")
        seconds = time.perf_counter() - began_s
        sent = hub.num_bytes
    with HubServer(files) as hub:
        arrived = _killed(hub, folder / "again", num_bytes // 2)
        _pull(hub, folder / "again")
        sent_killed = hub.num_bytes
    for pulled in ("whole", "again"):
        size = (folder / pulled / "model.safetensors").stat().st_size
        assert size > num_bytes, f"{pulled} has {size} bytes"
    return HeadRun(
        checkpoint_bytes=sum(path.stat().st_size for path in (folder / "huge").iterdir()),
        tensors_bytes=num_bytes,
        sent_bytes=sent,
        sent_bytes_killed=sent_killed,
        arrived_bytes=arrived,
        seconds=seconds,
    )


def _command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "updraft_cli", "model", "pull", "hf://org/public", str(folder), "--head-only"]


def _environment(hub: HubServer, folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder.parent / "home")}


def _pull(hub: HubServer, folder: Path) -> None:
    environment = _environment(hub, folder)
    subprocess.run(_command(folder), env=environment, timeout=TIMEOUT_S, capture_output=True, check=True)


def _killed(hub: HubServer, folder: Path, after_bytes: int) -> int:
    """Kill a download when the server has sent so many bytes; return how many are on disk."""
    hub.stops_after = after_bytes
    until_s = time.monotonic() + TIMEOUT_S
    with subprocess.Popen(_command(folder), env=_environment(hub, folder), stderr=subprocess.DEVNULL) as process:
        while not hub.waits():
            assert time.monotonic() < until_s
            time.sleep(0.05)
        time.sleep(_WRITTEN_S)
        process.kill()
    (part,) = (folder / ".updraft").glob("head-*.part")
    hub.stops_after = None
    hub.ends.set()
    return part.stat().st_size
