"""Several replicas of an operator, each as a user of its own, so that the audit log tells who wrote; and who led when."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.access import Api, Audited, audited
from tests.cluster.control_plane import ControlPlane
from tests.cluster.operator import requests
from tests.cluster.operator.accounts import Account, account
from tests.support.operator import OperatorProcess
from tests.support.wait import LONG_S, wait_until


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """One of them."""

    account: Account
    process: OperatorProcess


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """While one user held the Lease, by the audit log."""

    user: str
    since: str


class Replicas:
    """Those of one operator."""

    def __init__(self, cluster: ControlPlane, members: Sequence[Replica]) -> None:
        self.cluster = cluster
        self.members = members

    def leader(self, *, other_than: Replica | None = None, timeout_s: float = LONG_S) -> Replica:
        """The one that leads, as soon as one does."""
        found: list[Replica] = []

        def is_led() -> bool:
            leaders = (each for each in self.members if each is not other_than and each.process.is_leader)
            found.extend(leaders)
            return bool(found)

        wait_until(is_led, timeout_s=timeout_s, what="a leader")
        return found[0]

    def terms(self) -> list[Term]:
        """Who held the Lease, oldest first."""
        users, terms = {each.account.user for each in self.members}, list[Term]()
        for each in audited(self.cluster.audit_log):
            is_taken = each.resource == "leases" and each.verb in ("create", "update") and each.code < 300
            if each.user in users and is_taken and (not terms or terms[-1].user != each.user):
                terms.append(Term(user=each.user, since=each.time))
        return terms

    def writes(self, since: str = "") -> list[Audited]:
        """Of all of them, by the time at which they came."""
        found = [each for one in self.members for each in requests.writes(self.cluster, one.account.user, since)]
        return sorted(found, key=lambda each: each.time)

    def strays(self) -> list[Audited]:
        """Writes of one that did not hold the Lease at that time."""
        terms, strays = self.terms(), []
        for each in self.writes():
            held = [term for term in terms if term.since <= each.time]
            if not held or held[-1].user != each.user:
                strays.append(each)
        return strays


@contextmanager
def replicas(
    cluster: ControlPlane, api: Api, folder: Path, home: str, watched: Sequence[str], *, number: int = 2, **more: object
) -> Iterator[Replicas]:
    """Start some that look after the `watched` namespaces; their Lease is in `home`."""
    names = [f"replica-{index}" for index in range(number)]
    with ExitStack() as running:
        members = []
        for name in names:
            who = account(cluster, api, folder, home, name, watched=watched)
            chosen = {"namespace": home, "identity": name, "watch_namespaces": ",".join(watched), **more}
            process = running.enter_context(OperatorProcess(who.kubeconfig, folder / f"{name}.log", **chosen))
            members.append(Replica(account=who, process=process))
        for each in members:
            each.process.wait_until_ready()
        yield Replicas(cluster, members)
