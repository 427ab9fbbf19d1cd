"""The variables and arguments that a server of each engine needs to work with Updraft. Pure."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

EngineName = Literal["sglang", "vllm"]

TITLES: dict[EngineName, str] = {"sglang": "SGLang", "vllm": "vLLM"}
OLDEST: dict[EngineName, str] = {"sglang": "0.5.23", "vllm": "0.32.0"}
"""The first release that Updraft can work with."""

SGLANG_LOADER = "updraft_sglang.weights.load"

_KEY = "admin-key.yaml"
"""The file with the admin key, for the server's --config."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """The needs of one server. `folder` contains Updraft's files for it."""

    engine: EngineName
    model: str
    folder: Path
    num_steps: int = 3
    num_ranks: int = 1
    """Tensor-parallel ranks. The agent swaps the drafts of several by requests to an SGLang server, with its admin key; in a
    vLLM server, the plugin swaps them."""
    url: str = "http://127.0.0.1:30000"
    """The server's address for these requests; SGLang's own by default."""

    @property
    def has_admin_key(self) -> bool:
        """Whether the agent makes requests to the server."""
        return self.engine == "sglang" and self.num_ranks > 1

    @property
    def prepare(self) -> str:
        """The command that writes the plugin's folder and the first draft, once; for several ranks also the admin key."""
        options = ["--plugin-dir", self._path("plugin"), "--seed", self._path("draft")]
        options += ["--admin-key-file", self._path(_KEY)] if self.has_admin_key else []
        command = shlex.join(["updraft-inference", f"prepare-{self.engine}", *options])
        return f"UPDRAFT_INFERENCE_MODEL={shlex.quote(self.model)} {command}"

    @property
    def plugin_path(self) -> str:
        """The variable with which the server finds the plugin."""
        return f"PYTHONPATH={shlex.quote(self._path('plugin'))}"

    @property
    def socket(self) -> str:
        """The variable with which the plugin finds the agent."""
        return f"UPDRAFT_{self.engine.upper()}_SOCKET={shlex.quote(self._path('tap.sock'))}"

    @property
    def environment(self) -> str:
        """The server's variables."""
        return f"{self.plugin_path} {self.socket}"

    @property
    def arguments(self) -> str:
        """The server's arguments."""
        if self.engine == "vllm":
            config = {"method": "eagle3", "model": self._path("draft"), "num_speculative_tokens": self.num_steps}
            ranks = f" --tensor-parallel-size {self.num_ranks}" if self.num_ranks > 1 else ""
            return f"--speculative-config {shlex.quote(json.dumps(config))}{ranks}"
        speculation = shlex.join(
            [
                *("--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", self._path("draft")),
                *("--speculative-num-steps", str(self.num_steps), "--speculative-eagle-topk", "1"),
                *("--speculative-num-draft-tokens", str(self.num_steps + 1)),
                *("--custom-weight-loader", SGLANG_LOADER, "--enable-metrics"),
            ]
        )
        return f"{speculation} --tp-size {self.num_ranks} {self.admin_key}" if self.num_ranks > 1 else speculation

    @property
    def admin_key(self) -> str:
        """The server's argument for its admin key."""
        return shlex.join(["--config", self._path(_KEY)])

    @property
    def sidecar(self) -> str:
        """The agent's command, with Redis and a registry on this machine."""
        variables = {
            "MODEL": self.model,
            f"{self.engine.upper()}_SOCKET": self._path("tap.sock"),
            "INITIAL_DRAFT": self._path("draft"),
            "REDIS_URL": "redis://127.0.0.1:6379",
            "REGISTRY_ADDRESS": "127.0.0.1:50051",
        }
        command = ["updraft-inference", "--engine", self.engine]
        if self.has_admin_key:
            variables["SGLANG_ADMIN_KEY_FILE"] = self._path(_KEY)
            command += ["--attach", self.url]
        settings = [f"UPDRAFT_INFERENCE_{name}={shlex.quote(value)}" for name, value in variables.items()]
        return f"{' '.join(settings)} {shlex.join(command)}"

    def _path(self, name: str) -> str:
        return str(self.folder / name)
