"""The two roles of a rank's process, with a connection to the agent each.

`scheduler` counts requests, reports their ends and turns drafting on and off; `worker` captures rows and swaps drafts.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch

from updraft_sglang import configuration, names
from updraft_sglang.draft import SglangDraft
from updraft_sglang.drafting import DraftingHooks
from updraft_sglang.http_process import misfit, unasked
from updraft_sglang.reloads import Reloads, UnprovedDraft
from updraft_sglang.requests import RequestHooks
from updraft_sglang.rows import RowHooks
from updraft_sglang.selection import Selection
from updraft_sglang.weights import answered, preparation, served
from updraft_tap import hooks
from updraft_tap.between_steps import BetweenSteps
from updraft_tap.channel import Channel
from updraft_tap.hello import Hello, answered_policy
from updraft_tap.hooks import Binding
from updraft_tap.settings import Settings
from updraft_tap.swap import Swap
from updraft_tap.weights import RefusedError

log = logging.getLogger(__name__)

KNOWN_VERSION = "0.5.23"


class SchedulerRole:
    """Counts requests and switches drafting. `http`: the hooks of the HTTP process, and why they are not in place.

    `server` is the same in all processes of a server, and so is `secret`, which nobody else knows.
    """

    def __init__(
        self, settings: Settings, selection: Selection, http: Mapping[str, str], *, server: str, secret: str
    ) -> None:
        self._http = http
        self._selection = selection
        self._switches = settings.drafting != "always"
        self._hello = _hello("scheduler", server)
        self.channel = Channel(
            path=settings.socket, queue_bytes=settings.queue_bytes, hello=self._hello.facts, take=self._take
        )
        self._requests = RequestHooks(channel=self.channel, selection=selection, served=served)
        self._drafting = DraftingHooks(
            served=served,
            guard=hooks.logged_guard(log, "cannot switch drafting"),
            tell=self.channel.reply if settings.drafting == "auto" else None,
            secret=secret,
        )
        self._counting = _of_requests(self._requests)
        self.bindings = (*self._counting, *(self._drafting.bindings if self._switches else ()))
        """All hooks to register."""

    def check(self) -> None:
        """Learn which hooks are in place, and whether this server's requests can be counted."""
        switch = {names.WORKER: self._drafting.problem} if self._switches else {}
        for problem in filter(None, switch.values()):
            log.warning("Updraft cannot turn drafting off: %s", problem)
        found = hooks.states(self._counting)
        self._hello.learn(
            ranks=configuration.ranks(),
            hooks={**self._http, **found, **switch},
            unhooked=self._requests.guard.unhooked,
            unasked=unasked(self._http),
        )
        self.channel.problem = _misfit(found) or configuration.replicas()
        self._requests.is_active = not self.channel.problem

    def _take(self, message: Mapping[str, Any]) -> None:
        match message.get("kind"):
            case "answer":
                self._selection.forget()
                self._requests.forget()
                self._drafting.forget()
            case "policy":
                self._selection.policy = answered_policy(message, self.channel)


class WorkerRole:
    """Captures rows, and swaps the draft of a server with one rank."""

    def __init__(self, settings: Settings, selection: Selection, server: str) -> None:
        self._selection = selection
        self._hello = _hello("worker", server)
        self.channel = Channel(
            path=settings.socket, queue_bytes=settings.queue_bytes, hello=self._hello.facts, take=self._take
        )
        self._between = BetweenSteps(self._synchronize)
        self._rows = RowHooks(
            channel=self.channel, selection=selection, between=self._between, served=served, top_k=settings.top_k
        )
        self._reloads = Reloads()
        self._device: torch.device | None = None
        self._swap: Swap | None = None
        self.no_swap = "the worker is starting"
        self._capturing = _of_rows(self._rows)
        of_ranks = (
            Binding(target=names.UPDATE, hook=answered, parameters=("self", "named_tensors", "load_format")),
            Binding(target=names.CHECK, hook=preparation.check, parameters=("self", "recv_req")),
        )
        self.bindings = (*self._capturing, *self._reloads.bindings, *of_ranks)
        """All hooks to register."""

    def watch(self) -> None:
        """With several ranks: notice updates by others, although the plugin makes none."""
        self._reloads.watch(UnprovedDraft(served), self.channel.restate)

    def check(self, worker: Any) -> None:
        """Learn which hooks are in place, and whether the models in SGLang's `worker` can be captured and swapped."""
        rows, reloads = hooks.states(self._capturing), hooks.states(self._reloads.bindings)
        self._hello.learn(ranks=configuration.ranks(), hooks={**rows, **reloads}, unhooked=self._rows.guard.unhooked)
        self.channel.problem = self.no_swap = (
            _misfit(rows) or configuration.replicas() or configuration.unsupported(worker)
        )
        if not self.channel.problem:
            self._hello.learn(**configuration.facts(worker))
            self.no_swap = _misfit(reloads) or self._prepare_swap(worker)

    def _prepare_swap(self, worker: Any) -> str:
        """Why this process cannot swap drafts; "" if it can."""
        if several := configuration.several_ranks():
            return several
        try:
            draft = SglangDraft(worker.draft_worker.draft_runner.model, worker.target_worker.model_runner.model)
        except RefusedError as error:
            return str(error)
        self._device = draft.device
        self._swap = Swap(draft=draft, between=self._between, served=served, reply=self.channel.reply)
        self._reloads.watch(self._swap, self.channel.restate)
        return ""

    def _synchronize(self) -> None:
        """Name the device, because the thread of a swap has another current device than the scheduler's thread."""
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _take(self, message: Mapping[str, Any]) -> None:
        match message.get("kind"):
            case "answer":
                self._selection.forget()
            case "policy":
                self._selection.policy = answered_policy(message, self.channel)
            case "load" if self._swap is not None:
                self._swap.load(message)
            case "load":
                self.channel.reply({"kind": "loaded", "version": message.get("version"), "refusal": self.no_swap})


def _of_requests(body: RequestHooks) -> tuple[Binding, ...]:
    scheduler = names.SCHEDULER
    return (
        Binding(target=f"{scheduler}.handle_generate_request", hook=body.add, parameters=("self", "recv_req")),
        Binding(target=f"{scheduler}.process_batch_result", hook=body.step, parameters=("self", "batch", "result")),
        Binding(target=f"{scheduler}.continue_generation", hook=body.resume, parameters=("self", "recv_req")),
        Binding(target=f"{scheduler}.send_abort_output", hook=body.abort, parameters=("self", "abort_req", "req")),
        Binding(target=names.STREAM, hook=body.stream, parameters=("self", "reqs", "return_logprob", "skip_req")),
        Binding(target=names.JUDGE, hook=body.judge, parameters=("self", "result", "batch")),
    )


def _of_rows(body: RowHooks) -> tuple[Binding, ...]:
    return (
        Binding(target=names.FORWARD, hook=body.forward, parameters=("self", "batch")),
        Binding(
            target=names.VERIFY,
            hook=body.verify,
            parameters=("verify_input", "batch", "logits_output"),
            called_as=(names.VERIFY_AS_CALLED,),
        ),
        Binding(target=names.PREFILL, hook=body.prefill, parameters=("self", "logits_output", "forward_batch")),
    )


def _hello(role: str, server: str) -> Hello:
    return Hello(role, server=server, engine=names.ENGINE, version=configuration.version(), served=served)


def _misfit(found: Mapping[str, str]) -> str:
    problem = misfit(found)
    return (
        f"hooks do not fit SGLang {configuration.version()} (tested with {KNOWN_VERSION}): {problem}" if problem else ""
    )
