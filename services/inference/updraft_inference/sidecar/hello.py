"""How the processes of a server introduce themselves. Pure."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from updraft_inference.tap.server_kind import ServerKind
from updraft_tap import wire

Role = Literal["scheduler", "worker"]
"""The process that knows the requests, and the one that has the model; on a GPU both may be one."""


_LONGEST = 500
"""Maximum length of the plugin's texts in logs and reports."""


def line(text: str) -> str:
    """The text as one printable line of limited length. Paths in messages may contain characters that are not valid UTF-8."""
    return "".join(char if char.isprintable() else "?" for char in text[:_LONGEST])


Line = Annotated[str, AfterValidator(line)]

Uint32 = Annotated[int, Field(ge=0, lt=1 << 32)]
"""A number that fits into reports and traces."""


def problems(error: ValidationError) -> str:
    """The errors of a message, on one line."""
    return line("; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()))


class EngineName(BaseModel, frozen=True):
    """The engine that the plugin runs in."""

    name: Line
    version: Line


class Hello(BaseModel, frozen=True):
    """How a process introduces itself when it connects; see `updraft_tap.wire`."""

    id: str
    """Unique to the process."""
    server: str = ""
    """The same in all processes of a server, and in no other's; "" if the plugin does not know."""
    tap: Line
    engine: EngineName
    pid: int
    ranks: dict[str, Uint32] = {}
    """Number of ranks by kind of parallelism."""
    role: Role
    loader: Role = "worker"
    """The role to which loads are sent."""
    dtype: str
    device: Line = ""
    quantization: Line = ""
    """The server's name for how the target's weights are quantized."""
    version: Uint32
    digest: Line
    problem: Line
    unasked: Line = ""
    """Why requests are counted and not captured."""

    @classmethod
    def of(cls, header: Mapping[str, Any], kind: ServerKind) -> "Hello":
        """Parse the header. Raises FrameError, with the reason, if this process is refused."""
        if header.get("protocol") != wire.PROTOCOL:
            raise wire.FrameError(
                f"Updraft's plugin {header.get('tap')} in the {kind.engine} server uses protocol {header.get('protocol')}, but"
                f" this agent uses {wire.PROTOCOL}: run `updraft-inference {kind.prepare}` and restart the server"
            )
        try:
            hello = cls.model_validate(header)
        except ValidationError as error:
            raise wire.FrameError(f"malformed hello from the plugin: {problems(error)}") from error
        if hello.engine.name != kind.engine:
            raise wire.FrameError(
                f"a plugin in {hello.engine.name} connected, but this agent is for {kind.engine}: give each server its own"
                " socket"
            )
        return hello

    def is_beside(self, other: "Hello") -> bool:
        """Whether both may be processes of one server, each with a role of its own; or the same process again."""
        if self.id == other.id:
            return True
        return self.role != other.role and (self.server == other.server or not self.server or not other.server)
