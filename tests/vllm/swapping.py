"""A swap of the draft in a running vLLM by its stock endpoints, with the backend of `plugin/`."""

import json
import shutil
from pathlib import Path

from tests.vllm.server import Server

_PLUGIN = Path(__file__).parent / "plugin"
_BACKEND = "updraft_draft_file"

OPTIONS = ("--weight-transfer-config", json.dumps({"backend": _BACKEND}))


def install_plugin(folder: Path) -> dict[str, str]:
    """Make a folder hold the plugin as if it were installed; return the variables with which vLLM finds it."""
    shutil.copytree(_PLUGIN, folder)
    metadata = folder / f"{_BACKEND}-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {_BACKEND}\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{_BACKEND} = {_BACKEND}:register\n")
    return {"PYTHONPATH": str(folder), "VLLM_SERVER_DEV_MODE": "1"}


def swap(server: Server, draft: Path, *, version: str) -> None:
    """Replace the draft's weights between two steps, with requests held."""
    server.post("/pause?mode=keep")
    server.post("/start_draft_weight_update")
    server.post("/update_weights", {"update_info": {"folder": str(draft)}})
    server.post("/finish_weight_update", {"weight_version": version})
    server.post("/resume")


def target_checksums(server: Server) -> dict[str, str]:
    """vLLM's own checksum of every tensor of the target; it has none of the draft."""
    return dict(server.post("/weight_checker", {"action": "checksum"})["checksums"])
