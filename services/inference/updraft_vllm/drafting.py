"""How many tokens a step of vLLM drafts: its configured number, or none.

Before each step vLLM's scheduler reads a number from `dynamic_sd_lookup`, by the size of the batch. The plugin puts its own
object there. Drafts are proposed at the end of a step and verified in the next.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from updraft_tap.drafting.switch import MEASURING, UNTRAINED, Drafting, may_draft
from updraft_tap.hooks import Binding, Guard, Hook
from updraft_tap.steps import VERSION_ATTRIBUTE
from updraft_tap.weights import ServedVersion
from updraft_vllm import configuration, names
from updraft_vllm.runners import Runner

log = logging.getLogger(__name__)


def is_untrained(config: Any) -> bool:
    """Whether the server starts with a draft that nobody has trained."""
    speculative = config.speculative_config
    draft = speculative.draft_model_config if speculative is not None else None
    return draft is not None and bool(getattr(draft.hf_config, UNTRAINED, False))


def fixed(scheduler: Any) -> str:
    """Why this scheduler cannot ask before each step; "" if it can."""
    problem = configuration.fixed_drafts(scheduler.vllm_config)
    if problem or hasattr(scheduler, names.LENGTHS):
        return problem
    return f"vLLM {configuration.version()} has no {names.LENGTHS}, so drafting cannot be turned off"


class StepHooks:
    """In the scheduler's process."""

    def __init__(self, drafting: Drafting, guard: Guard) -> None:
        self._drafting = drafting
        self._guard = guard
        self.bindings = (
            Binding(
                target=f"{names.SCHEDULER}.update_from_output",
                hook=self.update,
                parameters=("self", "scheduler_output", "model_runner_output"),
            ),
            Binding(target=f"{names.SCHEDULER}.set_pause_state", hook=self.pause, parameters=("self", "pause_state")),
        )

    def limit(self, scheduler: Any) -> None:
        """Let this scheduler ask before each step; see `fixed`."""
        configured = getattr(scheduler, names.LENGTHS)
        setattr(scheduler, names.LENGTHS, _Lengths(self, configured, most=int(scheduler.num_spec_tokens)))

    def allows(self, batch_size: int) -> bool:
        """Whether the next step may draft."""
        return may_draft(self._drafting, self._guard, batch_size)

    def update(
        self, original: Hook, scheduler: Any, scheduler_output: Any, model_runner_output: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """AROUND Scheduler.update_from_output: a step has ended, and says which draft proposed."""
        self._guard("serve", self._serve, model_runner_output)
        self._guard(MEASURING, self._stepped, scheduler_output, model_runner_output)
        return original(scheduler, scheduler_output, model_runner_output, *args, **kwargs)

    def pause(self, original: Hook, scheduler: Any, pause_state: Any, *args: Any, **kwargs: Any) -> Any:
        """AROUND Scheduler.set_pause_state."""
        self._drafting.pause()
        return original(scheduler, pause_state, *args, **kwargs)

    def _serve(self, output: Any) -> None:
        version = getattr(output, VERSION_ATTRIBUTE, None)
        if version is not None:
            self._drafting.serve(version)

    def _stepped(self, scheduled: Any, output: Any) -> None:
        batch_size = len(scheduled.num_scheduled_tokens)
        tokens = sum(map(len, output.sampled_token_ids)) if batch_size else 0
        self._drafting.stepped(batch_size, tokens, is_drafted=_is_drafted(scheduled))


def _is_drafted(scheduled: Any) -> bool | None:
    """The kind of a step; None if it reads a prompt, or only verifies or only proposes."""
    drafts: Mapping[str, Sequence[int]] = scheduled.scheduled_spec_decode_tokens
    num_drafts, batch_size = sum(map(len, drafts.values())), len(scheduled.num_scheduled_tokens)
    reads = scheduled.scheduled_new_reqs or scheduled.total_num_scheduled_tokens - num_drafts != batch_size
    is_verified, is_proposing = num_drafts > 0, scheduled.num_spec_tokens_to_schedule > 0
    return None if reads or is_verified != is_proposing else is_verified


class _Lengths:
    """Stands for vLLM's list: the number of draft tokens by the size of the batch."""

    def __init__(self, hooks: StepHooks, configured: Sequence[int] | None, *, most: int) -> None:
        self._hooks = hooks
        self._configured = configured
        self._most = most

    def __getitem__(self, batch_size: int) -> int:
        if not self._hooks.allows(batch_size):
            return 0
        return self._most if self._configured is None else self._configured[batch_size]


class ProposalHooks:
    """In the worker's process, with a draft that nobody has trained. Where a step drafts nothing, vLLM still runs the draft
    once, so that it keeps up with the text; this draft need not. All ranks must do the same, because a draft's forward needs
    them all, so this depends only on what changes between the same two steps on all."""

    def __init__(self, *, runner: Runner, served: ServedVersion, guard: Callable[..., Any]) -> None:
        self.is_on = True
        """With several ranks, only once it is known that all of them have this hook."""
        self._runner = runner
        self._served = served
        self._guard = guard
        self.bindings = (Binding(target=runner.propose, hook=self.propose, parameters=runner.propose_parameters),)

    def propose(self, original: Hook, proposer: Any, *args: Any, **kwargs: Any) -> Any:
        """AROUND the function in which the draft proposes."""
        if self.is_on and self._served.written == 0 and kwargs.get("num_speculative_tokens") == 0:
            nothing = self._guard("drafting", self._runner.propose_nothing, proposer, args, kwargs)
            if nothing is not None:
                return nothing
        return original(proposer, *args, **kwargs)


def or_end(_: str, body: Callable[..., Any], *args: Any) -> Any:
    """The guard of one of several ranks: one that went on after an error of its own would not do what the others do, and wait.

    vLLM only logs an Exception of another rank than the first. When a process of a rank ends, vLLM ends the server.
    """
    try:
        return body(*args)
    except Exception as error:
        log.critical("Updraft: this rank cannot leave out the untrained draft, so the server ends: %s", error)
        raise SystemExit(f"an untrained draft cannot be left out: {error}") from error
