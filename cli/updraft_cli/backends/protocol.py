"""The interface of the place where drafts are managed: a registry, or the API server of a cluster.

Errors are UpdraftErrors. Which speculator a call concerns is settled when the backend is made.
"""

import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, Self, TypeVar

from updraft_chassis.errors import Unavailable
from updraft_chassis.retry import Backoff
from updraft_cli.backends.drafts import DraftDetails, DraftList, History
from updraft_cli.backends.installation import Installation
from updraft_cli.backends.policy import Policy
from updraft_cli.backends.snapshot import PodDetails, Snapshot
from updraft_cli.backends.speculators import RolloutStatus

Value = TypeVar("Value")

Version = int | str
"""A number, or one of `speculators.ROLES`."""


class Verb(StrEnum):
    PIN = "pin"
    UNPIN = "unpin"
    PROMOTE = "promote"
    PAUSE = "pause"
    RESUME = "resume"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    namespace: str = ""
    name: str
    """Name of the speculator."""
    verb: Verb
    version: int | None
    field: str = ""
    """Field of the AdaptiveSpeculator that carries it."""
    value: Any = None
    """Value of that field; None: removed from the spec."""
    changed: bool
    """False: it was so already, or this was a dry run."""
    dry_run: bool = False
    message: str
    warning: str = ""
    """Who else manages the field."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyChange:
    """A policy before and after it was set."""

    speculator: str
    before: Policy
    after: Policy
    message: str
    warning: str = ""


class Backend(Protocol):
    """A registry or a cluster, and one speculator in it."""

    def installation(self) -> Installation:
        """Return all speculators, or the one that was named, with what else runs beside them."""

    def watch_installation(self) -> Generator[Installation | Unavailable]:
        """Yield every state, and every outage after the first state; endless."""

    def drafts(self) -> DraftList:
        """Return the versions, newest first."""

    def draft(self, version: Version) -> DraftDetails:
        """Return all facts about one version."""

    def history(self, version: Version | None, *, limit: int | None, has_kubernetes_events: bool) -> History:
        """Return the last changes of one version or of all, oldest first; without a limit, the backend's default."""

    def rollout(self, version: Version | None) -> RolloutStatus:
        """Return the rollout of a version; None: of the candidate, else of the newest."""

    def watch_rollout(
        self, version: Version | None, *, is_endless: bool, deadline_s: float | None
    ) -> Generator[RolloutStatus | Unavailable]:
        """Yield every state of a rollout, and every outage after the first; TimeoutError at `deadline_s` (monotonic).

        Endless, it always follows the version in canary, else the newest.
        """

    def policy(self) -> Policy:
        """Return the policy in force."""

    def set_policy(self, whole: Policy | None, changes: dict[str, Any]) -> PolicyChange:
        """Set `whole` (None: the policy in force) with `changes`, by path."""

    def decide(self, verb: Verb, version: Version | None) -> Decision:
        """Carry out a decision; Conflict if it contradicts another one."""

    def names(self) -> tuple[str, ...]:
        """Return the names of all speculators, for completion."""

    def numbers(self) -> tuple[tuple[int, str], ...]:
        """Return the version numbers with a few words about each, for completion."""


class ConsoleBackend(Protocol):
    """A registry or a cluster as the console uses it; a `Backend` is one too."""

    @property
    def place(self) -> str:
        """Where the console looks, in a few words for a person."""

    @property
    def has_reasons(self) -> bool:
        """Whether a decision can carry a reason."""

    def snapshots(self) -> Generator[Snapshot]:
        """Yield the state of all speculators as it is at each `next`; endless."""

    def draft(self, version: Version) -> DraftDetails:
        """Return all facts about one version."""

    def pod(self, name: str) -> PodDetails:
        """Return all facts about one pod; NotFound if there is none of this name."""

    def decide(self, verb: Verb, version: Version | None) -> Decision:
        """Carry out a decision; Conflict if it contradicts another one."""

    def refusal(self) -> str:
        """Return why this person may not decide, in one sentence; empty if they may, or if only the attempt would tell."""

    def about(self, speculator: str, reason: str = "") -> Self:
        """Return this backend for one speculator; decisions carry `reason`."""


def with_outages(
    states: Callable[[], Generator[Value]], *, deadline_s: float | None = None
) -> Generator[Value | Unavailable]:
    """Yield the states of `states()`, called again whenever it ends; Unavailable is yielded too.

    TimeoutError once `deadline_s` (monotonic) has passed. Only the first state has to come: a wrong address should fail
    at once.
    """
    backoff, has_begun = Backoff(initial_s=0.5, cap_s=5.0), False
    while True:
        try:
            with closing(states()) as current:
                for state in current:
                    yield state
                    has_begun = True
                    backoff.reset()
        except Unavailable as error:
            if not has_begun:
                raise
            yield error
            time.sleep(next(backoff))
        if deadline_s is not None and time.monotonic() >= deadline_s:
            raise TimeoutError


def decided(verb: Verb, speculator: str, version: int | None, follows: str) -> str:
    done = {
        Verb.PIN: f"Version {version} is pinned" if version else "Pinned to no draft",
        Verb.UNPIN: "Nothing is pinned",
        Verb.PROMOTE: f"Version {version} is promoted",
        Verb.PAUSE: "The rollout is paused",
        Verb.RESUME: "The rollout goes on",
    }
    return f"{done[verb]} for {speculator}: {follows}"
