"""How a process of a server introduces itself to the agent, and its answer to a policy."""

import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from updraft_tap import __version__
from updraft_tap.channel import Channel
from updraft_tap.policy import Policy, read_policy
from updraft_tap.weights import ServedVersion

log = logging.getLogger(__name__)


class Hello:
    """The facts of a role in a process; see `updraft_tap.wire`. Never fails."""

    def __init__(self, role: str, *, server: str, engine: str, version: str, served: ServedVersion) -> None:
        self._served = served
        self._facts: dict[str, Any] = {
            "server": server,
            "tap": __version__,
            "engine": {"name": engine, "version": version},
            "role": role,
            "loader": role,
            "ranks": {},
            "hooks": {},
            "unhooked": {},
            "device": "",
            "unasked": "",
            "steps": 0,
            "aux_size": 0,
            "vocab_size": 0,
            "dtype": "",
            "quantization": "",
        }

    def learn(self, **facts: Any) -> None:
        """Include these facts from now on."""
        self._facts |= facts

    def facts(self) -> dict[str, Any]:
        """The fields of a hello now."""
        return {"pid": os.getpid(), **self._facts, "version": self._served.version, "digest": self._served.digest}


def answered_policy(message: Mapping[str, Any], channel: Channel) -> Policy:
    """Return the policy that now applies, and confirm it to the agent."""
    try:
        policy = read_policy(message)
    except ValueError as error:
        log.error("Updraft captures nothing, because its agent sent an invalid policy: %s", error)
        policy = Policy()
    channel.reply({"kind": "policy", **asdict(policy)})
    return policy
