"""A vLLM plugin of the test's own: a weight transfer backend that loads a checkpoint folder of this machine.

It runs in vLLM's processes and knows nothing of Updraft. vLLM has backends for GPUs only, and takes others by name; with
this one its stock endpoints swap a draft from the file that a pod has downloaded anyway. vLLM's prepacked CPU weights are
freed once loaded, so the model is given back its loadable shape first (layerwise reload), as its own backends do.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

BACKEND = "updraft_draft_file"


def register() -> None:
    """Make the backend known; vLLM calls this once in each of its processes."""
    WeightTransferEngineFactory.register_engine(BACKEND, FileEngine)


@dataclass
class Nothing:
    """There is no connection to set up."""


@dataclass
class Folder:
    """Where the checkpoint is."""

    folder: str


class FileEngine(WeightTransferEngine):  # type: ignore[misc]  # vLLM is not there where types are checked
    """Loads model.safetensors of a folder into the model that the session is for."""

    init_info_cls = Nothing
    update_info_cls = Folder

    def init_transfer_engine(self, init_info: Nothing) -> None:
        """Nothing to do."""

    def start_weight_update(self) -> None:
        """Give the model its loadable shape."""
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load, without the base's wait for an accelerator: there is none."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: Folder) -> None:
        """Load the folder's tensors."""
        self.model.load_weights(iter(load_file(Path(update_info.folder) / "model.safetensors").items()))

    def finish_weight_update(self) -> None:
        """Give the model its serving shape."""
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing to do."""
