"""Derives what a running server lacks from its answers. Pure."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, ValidationError

from updraft_cli.attach.needs import OLDEST, SGLANG_LOADER, TITLES, Needs


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A problem and its remedy."""

    problem: str
    remedy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """The answers of a server. None: the server has no such path, or the answer is not that of an engine."""

    version: str | None
    is_speculating: bool
    """Whether vLLM's metrics have counters of speculation."""
    plugin: Mapping[str, Any] | None
    info: Mapping[str, Any] | None = None
    """SGLang's /server_info."""
    is_refused: bool = False
    """Whether the server requires a key and refused the given one, or none."""
    is_open: bool = False
    """Whether the server answered a request without a key."""


class _Server(BaseModel):
    method: str
    steps: int
    ranks: dict[str, int]
    unsupported: str = ""
    """Why the server cannot be captured; "" if it can."""
    device: str
    eager: bool


class _Engine(BaseModel):
    name: str


class _Plugin(BaseModel):
    """The plugin's answer; see `updraft_tap.http.about`."""

    tap: str
    engine: _Engine
    socket: str
    agent: bool
    keys: bool
    hooks: dict[str, str]
    server: _Server | None


def found(needs: Needs, answers: Answers, *, ours: str, needs_keys: bool = False) -> tuple[Finding, ...]:
    """Everything that is missing. `ours` is the version of this Updraft's plugin. `needs_keys`: the server must require an API
    key."""
    return tuple(_found(needs, answers, ours, needs_keys=needs_keys))


def _found(needs: Needs, answers: Answers, ours: str, *, needs_keys: bool) -> Iterator[Finding]:
    title = TITLES[needs.engine]
    if answers.is_refused:
        yield Finding(
            problem="the server requires an API key, so the other checks were skipped",
            remedy="set UPDRAFT_API_KEY to one of its keys and check again",
        )
        return
    if answers.version is None:
        yield Finding(
            problem=f"the server does not answer as {title} does", remedy=f"give the URL of the {title} server itself"
        )
        return
    if _number(answers.version) < _number(OLDEST[needs.engine]):
        yield Finding(
            problem=f"{title} {answers.version} is too old", remedy=f"use {title} {OLDEST[needs.engine]} or later"
        )
    if needs_keys and answers.is_open:
        variable = f"UPDRAFT_{needs.engine.upper()}_API_KEYS_FILE"
        yield Finding(
            problem="the server answers requests without an API key",
            remedy=f"add to its environment: {variable}=FILE",
        )
    if needs.engine == "sglang":
        info = answers.info or {}
        yield from _of_sglang(needs, info)
        needs = replace(needs, num_ranks=max(_whole(info.get("tp_size")), 1))
    yield from _of_plugin(needs, answers, ours)


def _of_plugin(needs: Needs, answers: Answers, ours: str) -> Iterator[Finding]:
    """Findings from the plugin's answer; without it, from the server's own endpoints."""
    if answers.plugin is None:
        yield from _without_plugin(needs, answers)
        return
    try:
        plugin = _Plugin.model_validate(answers.plugin)
    except ValidationError:
        yield _stale(needs, "an unknown version", ours)
        return
    if plugin.tap != ours:
        yield _stale(needs, f"version {plugin.tap}", ours)
    if plugin.engine.name != TITLES[needs.engine]:
        yield Finding(
            problem=f"the server is {plugin.engine.name}", remedy=f"use --engine {plugin.engine.name.lower()}"
        )
        return
    yield from _of_link(needs, plugin)
    if plugin.server is not None:
        yield from _of_configuration(needs, plugin.server)


def _of_link(needs: Needs, plugin: _Plugin) -> Iterator[Finding]:
    if not plugin.socket:
        yield Finding(problem="the plugin has no socket", remedy=f"add to its environment: {needs.socket}")
    elif not plugin.agent:
        yield Finding(problem=f"no agent listens on {plugin.socket}", remedy=f"start one: {needs.sidecar}")
    for problem in filter(None, plugin.hooks.values()):
        yield Finding(
            problem=f"a hook of the plugin does not fit: {problem}",
            remedy=f"use {TITLES[needs.engine]} {OLDEST[needs.engine]}, with which Updraft is tested",
        )


def _stale(needs: Needs, version: str, ours: str) -> Finding:
    return Finding(
        problem=f"the plugin has {version}, but this Updraft has version {ours}",
        remedy=f"run `{needs.prepare}` and restart the server",
    )


def _without_plugin(needs: Needs, answers: Answers) -> Iterator[Finding]:
    engine = needs.engine.upper()
    yield Finding(
        problem="Updraft's plugin is not loaded",
        remedy=f"run `{needs.prepare}` and add to its environment: {needs.environment}"
        f" (and `updraft` to {engine}_PLUGINS if that is set)",
    )
    if needs.engine == "vllm" and not answers.is_speculating:
        yield Finding(problem="the server does not speculate", remedy=f"add the argument {needs.arguments}")


def _of_configuration(needs: Needs, server: _Server) -> Iterator[Finding]:
    if server.method != "eagle3":
        problem = f"the server speculates with {server.method}" if server.method else "the server does not speculate"
        yield Finding(problem=problem, remedy=f"add the argument {needs.arguments}")
    elif server.steps < 1:
        yield Finding(problem="the server drafts no tokens", remedy=f"add the argument {needs.arguments}")
    yield from _of_places(server)
    if needs.engine == "vllm" and server.device == "cpu" and not server.eager:
        yield Finding(problem="swaps on a CPU require eager execution", remedy="add the argument --enforce-eager")


def _of_places(server: _Server) -> Iterator[Finding]:
    """Findings about kinds of ranks, and about where they run."""
    others = {name: size for name, size in server.ranks.items() if size > 1 and name != "tensor"}
    for name, size in others.items():
        yield Finding(
            problem=f"{name} parallelism of {size} is not supported", remedy=f"set --{name}-parallel-size to 1"
        )
    if server.unsupported and server.method == "eagle3" and not others:
        yield Finding(
            problem=server.unsupported,
            remedy="run all ranks on one node with --distributed-executor-backend mp, and without context parallelism",
        )


def _of_sglang(needs: Needs, info: Mapping[str, Any]) -> Iterator[Finding]:
    algorithm, steps = info.get("speculative_algorithm"), _whole(info.get("speculative_num_steps"))
    if algorithm != "EAGLE3":
        problem = f"the server speculates with {algorithm}" if algorithm else "the server does not speculate"
        yield Finding(problem=problem, remedy=f"add the arguments {needs.arguments}")
        return
    if steps < 1 or _whole(info.get("speculative_num_draft_tokens")) != steps + 1:
        yield Finding(
            problem="the number of draft tokens is not the number of steps plus one",
            remedy=f"set --speculative-num-steps {max(steps, 1)} --speculative-num-draft-tokens {max(steps, 1) + 1}",
        )
    if _whole(info.get("speculative_eagle_topk")) != 1:
        yield Finding(problem="the server drafts trees", remedy="set --speculative-eagle-topk 1")
    if info.get("api_key"):
        yield Finding(
            problem="SGLang's --api-key also refuses probes and the agent",
            remedy="remove it, and set UPDRAFT_SGLANG_API_KEYS_FILE instead",
        )
    yield from _of_parallelism(needs, info)


def _of_parallelism(needs: Needs, info: Mapping[str, Any]) -> Iterator[Finding]:
    if _whole(info.get("tp_size")) > 1:
        yield from _of_ranks(needs, info)
    elif needs.num_ranks > 1:
        yield Finding(
            problem=f"the server has one rank, not {needs.num_ranks}", remedy="check without --tensor-parallel-size"
        )
    yield from _of_schedulers(info)


def _of_schedulers(info: Mapping[str, Any]) -> Iterator[Finding]:
    if _whole(info.get("dp_size")) > 1:
        yield Finding(
            problem="data parallelism is not supported", remedy="set --dp-size 1, and run one pod per replica"
        )
    if _whole(info.get("pp_size")) > 1:
        yield Finding(problem="pipeline parallelism is not supported", remedy="set --pp-size 1")


def _of_ranks(needs: Needs, info: Mapping[str, Any]) -> Iterator[Finding]:
    """Findings about several ranks. A server does not know how its agent was started, so the user confirms that."""
    several = replace(needs, num_ranks=_whole(info.get("tp_size")))
    if needs.num_ranks != several.num_ranks:
        yield Finding(
            problem=f"to swap the drafts of {several.num_ranks} tensor-parallel ranks, the agent needs --attach, which"
            " cannot be checked here",
            remedy=f"check again with --tensor-parallel-size {several.num_ranks} if it was started like this:"
            f" {several.sidecar}",
        )
    if SGLANG_LOADER not in (info.get("custom_weight_loader") or ()):
        yield Finding(
            problem="swaps of several tensor-parallel ranks require Updraft's weight loader",
            remedy=f"add the argument --custom-weight-loader {SGLANG_LOADER}",
        )
    if not info.get("admin_api_key"):
        yield Finding(
            problem="the server has no admin key, so its clients can pause it and change its weights",
            remedy=f"run `{several.prepare}` and add the arguments {several.admin_key}, or add admin-api-key to the file"
            " that --config names already",
        )


def _number(version: str) -> tuple[int, ...]:
    numbers = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, numbers.group().split("."))) if numbers else ()


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 0
