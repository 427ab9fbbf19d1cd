"""How many tokens a step of SGLang drafts: its configured number, or none.

For `--speculative-adaptive`, SGLang prepares the worker for several numbers at startup, and asks a policy before each step. The
plugin's policy replaces SGLang's own. It asks that one, or takes the fixed number of a server without this option.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from updraft_sglang import configuration, names
from updraft_sglang.ranks.agreement import first_problem, gathered
from updraft_sglang.ranks.plan import Plan, SharedPlan
from updraft_sglang.weights import ServedVersion
from updraft_tap import hooks
from updraft_tap.drafting.speedup import LOADS
from updraft_tap.drafting.switch import MEASURING, UNTRAINED, Drafting, Tell, may_draft
from updraft_tap.hooks import Binding, Guard, Hook, resolved

_IRREPLACEABLE = "the policy cannot be replaced"
_SEVERAL_NODES = "drafting cannot be turned off unless all ranks run on one node, because others may lack the plugin"


class DraftingHooks:
    """The hooks of each rank. The first one measures and decides, and its `SharedPlan` tells all of them.

    `secret` is the same in all processes of a server, and known to nobody else.
    """

    def __init__(self, *, served: ServedVersion, guard: Guard, tell: Tell | None, secret: str) -> None:
        self.problem = "there is no EAGLE-3 worker"
        """Why drafting cannot be turned off; "" if it can."""
        self._served = served
        self._guard = guard
        self._tell = tell
        self._secret = secret
        self._drafting: Drafting | None = None
        """None in all ranks but the first."""
        self._shared: SharedPlan | None = None
        self._is_due, self._planned_for = True, (0, False)
        """Whether a step has ended since the last plan, and the draft that it was for (see `ServedVersion.is_mixed`)."""
        self._configured_skip = os.environ.get(names.SKIP_EXTEND)
        scheduler = names.SCHEDULER
        self._receiving = Binding(target=names.RECEIVE, hook=self.receive, parameters=("self", "local_reqs"))
        self.bindings = (
            Binding(target=names.WORKER, hook=self.start, parameters=("self", "server_args")),
            Binding(target=f"{scheduler}.process_batch_result", hook=self.step, parameters=("self", "batch", "result")),
            Binding(target=f"{scheduler}.continue_generation", hook=self.resume, parameters=("self", "recv_req")),
            self._receiving,
        )

    def forget(self) -> None:
        """Another agent has connected. Called on the channel's thread."""
        if self._drafting is not None:
            self._drafting.forget()

    def start(self, original: Hook, worker: Any, *args: Any, **kwargs: Any) -> None:
        """AROUND EAGLEWorkerV2.__init__. Memory and CUDA graphs are set up later, for all numbers of the policy.

        All ranks get here. They change the policy only if each of them can: a rank alone would wait for the others without end.
        """
        original(worker, *args, **kwargs)
        server_args = kwargs.get("server_args", next(iter(args), None))
        self.problem, group = self._guard("switch", _group, server_args) or (_IRREPLACEABLE, None)
        if self.problem:
            return
        switch = self._guard("switch", self._made, worker, server_args)
        problem = _IRREPLACEABLE if switch is None else switch.problem
        self.problem = first_problem(gathered(problem, group))
        if not self.problem:
            self._drafting, self._shared = switch.drafting, switch.shared
            switch.controller.params, worker.adaptive_controller = switch.policy, switch.controller

    def receive(self, original: Hook, receiver: Any, *args: Any, **kwargs: Any) -> Any:
        """AROUND SchedulerRequestReceiver.recv_requests, once before each step."""
        if self._shared is None:
            return original(receiver, *args, **kwargs)
        return self._shared.receive(original, receiver, *args, **kwargs)

    def step(self, original: Hook, scheduler: Any, batch: Any, result: Any, *args: Any, **kwargs: Any) -> Any:
        """AROUND Scheduler.process_batch_result, once per step."""
        done = original(scheduler, batch, result, *args, **kwargs)
        self._is_due = True
        if self._drafting is not None:
            self._guard(MEASURING, self._stepped, self._drafting, batch, result)
        return done

    def resume(self, original: Hook, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        """AROUND Scheduler.continue_generation, which ends a time without steps."""
        if self._drafting is not None:
            self._drafting.pause()
        return original(scheduler, *args, **kwargs)

    def _stepped(self, drafting: Drafting, batch: Any, result: Any) -> None:
        """A verify step says of each request how many drafts were accepted; a prefill does not."""
        accepted, is_drafted = result.num_correct_drafts_per_req_cpu or (), None
        if accepted and batch.forward_mode.is_decode():
            is_drafted = result.speculative_num_draft_tokens > result.num_non_draft_tokens_per_req
        tokens = sum(accepted) + len(accepted) * result.num_non_draft_tokens_per_req
        drafting.stepped(len(batch.reqs), tokens, is_drafted=is_drafted)

    def _made(self, worker: Any, server_args: Any) -> "_Switch":
        """All that replaces the policy, and what could fail."""
        problem = _fixed(worker, server_args) or next(hooks.problems([self._receiving]), "")
        if problem:
            return _Switch(problem=problem)
        drafting, decide = None, None
        rank, num_ranks = configuration.place()
        if not rank:  # of each replica, too
            drafting = Drafting(is_untrained=_is_untrained(worker), tell=self._tell)
            decide = partial(self._decided, drafting, several=num_ranks > 1)
        shared = SharedPlan(self._secret, decide, self._obey)
        shared.check()
        controller = worker.adaptive_controller
        if controller is None:
            controller = resolved(names.CONTROLLER)(worker, FixedNumber(int(worker.speculative_num_steps)))
        policy = Policy(controller.params, shared.allows)
        return _Switch(drafting=drafting, shared=shared, controller=controller, policy=policy)

    def _decided(self, drafting: Drafting, *, several: bool) -> Plan | None:
        """The plan for the next steps; None if it is the same as before."""
        served = self._served.version, self._served.is_mixed
        if not self._is_due and served == self._planned_for:
            return None
        self._is_due, self._planned_for = False, served
        self._guard("serve", drafting.serve, self._served.version)  # also if no plan can be made
        if several and self._served.is_mixed:  # different drafts would propose different tokens
            return Plan()
        plan: Plan | None = self._guard("plan", self._plan, drafting)
        if plan is None and "plan" in self._guard.unhooked:
            return Plan(loads=() if drafting.is_useless else LOADS, is_useless=drafting.is_useless)
        return plan

    def _plan(self, drafting: Drafting) -> Plan:
        """The loads in which the next steps may draft."""
        loads = tuple(load for load in LOADS if may_draft(drafting, self._guard, load))
        return Plan(loads=loads, is_useless=drafting.is_useless)

    def _obey(self, plan: Plan) -> None:
        """Where a step drafts nothing, SGLang still runs the draft once, so that it keeps up with the text. A useless draft
        need not: SGLang has a variable for this, which it reads at each step."""
        skip = "true" if plan.is_useless else self._configured_skip
        if skip is None:
            os.environ.pop(names.SKIP_EXTEND, None)
        else:
            os.environ[names.SKIP_EXTEND] = skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Switch:
    """A new policy and its parts, or the problem for which there is none."""

    problem: str = ""
    drafting: Drafting | None = None
    shared: SharedPlan | None = None
    controller: Any = None
    policy: Any = None


def _group(server_args: Any) -> tuple[str, Any]:
    """The group of all ranks, or a problem: only processes of one machine all have the plugin and its settings."""
    if resolved(names.RESOLVED)(server_args).nnodes == 1:
        return "", configuration.group()
    return _SEVERAL_NODES, None


def _fixed(worker: Any, server_args: Any) -> str:
    """Why the number of draft tokens cannot change between steps; "" if it can. Most are SGLang's own reasons."""
    if not worker.speculative_algorithm.is_eagle3():
        return "this server does not draft with EAGLE-3"
    config = resolved(names.RESOLVED)(server_args)
    if config.pp_size > 1:
        return "with pipeline parallelism, drafting cannot be turned off"
    if config.scheduler_recv_interval > 1:  # a decision that waits for it would miss its slice
        return "with --scheduler-recv-interval above 1, drafting cannot be turned off"
    if config.enable_lora or config.enable_hisparse:
        return "with LoRA or HiSparse, drafting cannot be turned off"
    reason = resolved(names.NOT_ADAPTIVE)(server_args)
    return f"drafting cannot be turned off: {reason}" if reason else ""


def _is_untrained(worker: Any) -> bool:
    return bool(getattr(worker.draft_worker.draft_runner.model_config.hf_config, UNTRAINED, False))


class FixedNumber:
    """SGLang's AdaptiveSpecPolicy of a server without `--speculative-adaptive`."""

    def __init__(self, num_steps: int) -> None:
        self.candidate_steps = [num_steps]

    def set_cuda_graph_bs(self, cuda_graph_bs: list[int] | None) -> None: ...

    def get_steps_for_batch(self, batch_size: int) -> int:
        return self.candidate_steps[0]

    def on_verify_complete(self, num_correct_drafts_per_req: Sequence[int], batch_size: int) -> int | None:
        return None

    def cuda_graph_bs_for_step(self, step: int) -> list[int] | None:
        return None


class Policy:
    """An AdaptiveSpecPolicy that drafts nothing unless `allows` says so, else the number of the `configured` policy."""

    def __init__(self, configured: Any, allows: Callable[[int], bool]) -> None:
        self._configured = configured
        self._allows = allows
        self._was_on = self._is_on = True

    @property
    def candidate_steps(self) -> list[int]:
        """SGLang prepares the worker for each of these."""
        return sorted({0, *self._configured.candidate_steps})

    def set_cuda_graph_bs(self, cuda_graph_bs: list[int] | None) -> None:
        """Sizes of batches with CUDA graphs."""
        self._configured.set_cuda_graph_bs(cuda_graph_bs)

    def get_steps_for_batch(self, batch_size: int) -> int:
        """Called before each step that verifies."""
        self._was_on, self._is_on = self._is_on, self._allows(batch_size)
        return int(self._configured.get_steps_for_batch(batch_size)) if self._is_on else 0

    def on_verify_complete(self, num_correct_drafts_per_req: Sequence[int], batch_size: int) -> None:
        """A step that may not draft says nothing about the number to draft. Its result may come after the next step began. A
        change takes effect when the policy is asked again."""
        if self._was_on and self._is_on:
            self._configured.on_verify_complete(num_correct_drafts_per_req, batch_size)

    def cuda_graph_bs_for_step(self, step: int) -> list[int] | None:
        """None: all. Any batch may draft nothing."""
        sizes: list[int] | None = self._configured.cuda_graph_bs_for_step(step) if step else None
        return sizes
