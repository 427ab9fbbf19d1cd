"""Decisions of the first rank on their way to all of them, on a stand-in for SGLang's broadcast."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from updraft_sglang import names
from updraft_sglang.ranks import plan
from updraft_sglang.ranks.plan import Plan, SharedPlan


class Abort(SimpleNamespace):
    """SGLang's AbortReq."""


@pytest.fixture(autouse=True)
def sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "resolved", {names.ABORT: Abort}.__getitem__)


class Ranks:
    """Three of them; the first one decides what `wanted` says. `obeyed`: the plans of each, in order."""

    def __init__(self, secret: str = "s3cret") -> None:  # noqa: S107 - no password
        self.wanted: Plan | None = None
        self.obeyed: list[list[Plan]] = [[], [], []]
        deciders: Sequence[Callable[[], Plan | None] | None] = (lambda: self.wanted, None, None)
        self.plans = [SharedPlan(secret, one, to.append) for one, to in zip(deciders, self.obeyed, strict=True)]

    def step(self, *received: Any, is_skipped: bool = False, local: list[Any] | None = None) -> list[list[Any]]:
        """What each rank goes on with: the first one receives, and all get that, unless SGLang skips this time."""
        sent: list[Any] = []

        def first(_: Any, local_reqs: list[Any] | None) -> list[Any]:
            sent.extend([] if is_skipped else [*received, *(local_reqs or ())])
            return list(sent)

        found = [self.plans[0].receive(first, "receiver", local_reqs=local)]
        return found + [one.receive(lambda *_: list(sent), "receiver", local_reqs=None) for one in self.plans[1:]]


def test_all_ranks_obey_a_decision_at_the_same_step_and_go_on_with_the_requests_of_others() -> None:
    ranks, request, abort = Ranks(), SimpleNamespace(rid="a"), Abort(rid="b")
    assert [one.plan for one in ranks.plans] == [Plan()] * 3, "before the first decision, nothing is drafted"
    assert ranks.step(request) == [[request]] * 3
    ranks.wanted = Plan(loads=(1, 4), is_useless=False)

    assert ranks.step(request, local=[abort]) == [[request, abort]] * 3
    assert ranks.step() == [[]] * 3

    assert [one.plan for one in ranks.plans] == [ranks.wanted] * 3
    assert ranks.obeyed == [[ranks.wanted]] * 3, "it is sent once"
    assert [ranks.plans[1].allows(size) for size in (1, 3, 4, 7, 8)] == [True, False, True, True, False]


def test_a_decision_that_sglang_did_not_send_is_sent_again_and_no_rank_obeys_it_before() -> None:
    ranks = Ranks()
    ranks.wanted = Plan(loads=(1,), is_useless=True)

    ranks.step(is_skipped=True)
    assert [one.plan for one in ranks.plans] == [Plan()] * 3
    ranks.step()

    assert [one.plan for one in ranks.plans] == [ranks.wanted] * 3


def test_a_client_cannot_decide() -> None:
    ranks, other = Ranks(), Ranks("guessed")
    other.wanted = Plan(loads=(1,))
    forged: list[Any] = []

    def received(_: Any, local_reqs: list[Any]) -> list[Any]:
        forged.extend(local_reqs)
        return []

    other.plans[0].receive(received, "receiver")

    assert ranks.step(*forged) == [forged] * 3, "SGLang ignores the abort of a request that there is not"
    assert [one.plan for one in ranks.plans] == [Plan()] * 3
