"""`updraft-inference --engine vllm`: the agent beside a stock vLLM, as a process of its own."""

import subprocess
import sys
from pathlib import Path

from tests.support.ports import free_port
from tests.support.processes import Process, scrape, total
from tests.support.redis_server import RedisServer
from tests.support.registry import RegistryProcess
from tests.vllm.server import cpu_environment

_PREFIX = "UPDRAFT_INFERENCE_"


class Agent(Process):
    """It captures traffic of the server at `socket`, and follows the registry as the pod `name`."""

    def __init__(
        self,
        folder: Path,
        model: Path,
        socket: Path,
        redis: RedisServer,
        registry: RegistryProcess,
        *,
        seed: Path,
        name: str = "pod-0",
    ) -> None:
        self.port = free_port()
        variables = {
            "MODEL": str(model),
            "VLLM_SOCKET": str(socket),
            "DATA_DIR": str(folder / name),
            "METRICS_PORT": str(self.port),
            "REDIS_URL": redis.url,
            "REGISTRY_ADDRESS": registry.address,
            "POD_NAME": name,
            "INITIAL_DRAFT": str(seed),
            "CAPTURE_EVALUATION_FRACTION": "0.3",
            "LOG_FORMAT": "text",
        }
        prefixed = {f"{_PREFIX}{key}": value for key, value in variables.items()}
        super().__init__("updraft_inference", prefixed, folder / f"{name}.log", ["--engine", "vllm"])

    def metric(self, name: str) -> float:
        """A sum over the labels of a metric."""
        return total(scrape(self.port), f"updraft_inference_{name}")


def prepare(model: Path, *, plugin: Path, seed: Path, draft_vocab: int) -> None:
    """Write the plugin's folder and a first draft, as an operator does."""
    variables = {f"{_PREFIX}MODEL": str(model), f"{_PREFIX}DRAFT_VOCAB_SIZE": str(draft_vocab)}
    command = ["-m", "updraft_inference", "prepare-vllm", "--plugin-dir", str(plugin), "--seed", str(seed)]
    subprocess.run([sys.executable, *command], env=cpu_environment() | variables, check=True)
