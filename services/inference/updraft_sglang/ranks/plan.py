"""Whether the next steps draft: the first rank decides, and all ranks obey the same decision at the same step.

Ranks that decide by themselves could differ, because their clocks do, and would wait for each other without end. Before each
step SGLang's first rank receives requests and sends them to the others. A decision travels with them, as an abort of a request
whose id contains a secret of the server's processes, so that no client can send one. Every rank takes it out again and obeys
it, the first one too: a decision that has not arrived is none.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from updraft_sglang import names
from updraft_tap.drafting.speedup import load_of
from updraft_tap.hooks import Hook, resolved

_PREFIX = "updraft-plan"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`loads`: those in which steps draft (see `load_of`). `is_useless`: the draft knows nothing and need not read the text."""

    loads: tuple[int, ...] = ()
    is_useless: bool = False


class SharedPlan:
    """The plan of all ranks. `decide` says what the first rank wants now, or None if nothing has changed; in others it is None.

    `obey` is called with each plan that arrives. Until the first one, no rank drafts.
    """

    def __init__(self, secret: str, decide: Callable[[], Plan | None] | None, obey: Callable[[Plan], None]) -> None:
        self.plan = Plan()
        self._prefix = f"{_PREFIX} {secret} "
        self._decide = decide
        self._wanted: Plan | None = None
        """The last decision of this rank."""
        self._obey = obey

    def check(self) -> None:
        """Raises whatever goes wrong if this release of SGLang cannot send a plan: in `receive`, it would end the server."""
        if not self._is_ours(self._sent(Plan())):
            raise TypeError(f"{names.ABORT} does not keep its rid")

    def allows(self, batch_size: int) -> bool:
        """Whether the next step, of so many requests, may draft."""
        return load_of(batch_size) in self.plan.loads

    def receive(self, original: Hook, receiver: Any, local_reqs: Any = None, *args: Any, **kwargs: Any) -> list[Any]:
        """AROUND SchedulerRequestReceiver.recv_requests."""
        decided = self._decide() if self._decide is not None else None
        self._wanted = decided or self._wanted
        if self._wanted is not None and self._wanted != self.plan:
            local_reqs = [*(local_reqs or ()), self._sent(self._wanted)]
        return self._taken(original(receiver, local_reqs, *args, **kwargs))

    def _sent(self, plan: Plan) -> Any:
        fields = {"loads": plan.loads, "is_useless": plan.is_useless}
        return resolved(names.ABORT)(rid=self._prefix + json.dumps(fields))

    def _taken(self, received: list[Any]) -> list[Any]:
        """The requests of others. What arrives is the same in all ranks, so they do the same here."""
        ours = [one.rid for one in received if self._is_ours(one)]
        if not ours:
            return received
        fields = json.loads(ours[-1].removeprefix(self._prefix))
        self.plan = Plan(loads=tuple(fields["loads"]), is_useless=fields["is_useless"])
        self._obey(self.plan)
        return [one for one in received if not self._is_ours(one)]

    def _is_ours(self, request: Any) -> bool:
        rid = getattr(request, "rid", None)
        return isinstance(rid, str) and rid.startswith(self._prefix)
