"""The Registry service: each call converts its request, calls the core, and converts the result."""
# ruff: noqa: N802 - gRPC names the methods

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar

from updraft.registry.v1 import registry_pb2 as pb
from updraft.registry.v1 import registry_pb2_grpc
from updraft_chassis import rpc
from updraft_chassis.errors import InvalidInput, UpdraftError
from updraft_chassis.rpc import Context
from updraft_registry.api import tenants
from updraft_registry.api.deltas import Deltas
from updraft_registry.api.fetching import Fetching
from updraft_registry.api.publication import publish
from updraft_registry.control import Control
from updraft_registry.messages import wire
from updraft_registry.messages.admission import check_name
from updraft_registry.metrics import Metrics
from updraft_registry.rollout import decision
from updraft_registry.storage.archive import Action, Archive

_DEFAULT_PAGE = 100
_MAX_PAGE = 1000
_PAGE_BYTES = rpc.MAX_MESSAGE_BYTES // 2
"""Maximum size of the versions or pods in a page, unless it has only one. The rest is for the states of speculators."""

Part = TypeVar("Part", pb.Version, pb.PodState)

_MAX_LINE = 500
_MAX_NAME = 80
"""Characters of the name of a kind of traffic or of a phase. `List` has room for many reports of at most 35 KB."""
_MAX_PHASES, _MAX_KINDS, _MAX_SHIFTS = 32, 40, 8
_MAX_FIGURE = 1e12
_LAST_MS = 253_402_300_799_000
"""The last second of the year 9999: no reader's calendar has later ones."""
_MAX_DIGITS = 10
"""Maximum digits of a version in a page token."""


class RegistryServicer(registry_pb2_grpc.RegistryServicer):
    """See registry.proto for the contract of each call."""

    def __init__(
        self, archive: Archive, control: Control, fetching: Fetching, deltas: Deltas, metrics: Metrics
    ) -> None:
        self._archive = archive
        self._control = control
        self._fetching = fetching
        self._deltas = deltas
        self._metrics = metrics

    async def Publish(self, request_iterator: AsyncIterator[pb.PublishRequest], context: Context) -> pb.PublishResponse:
        with self._refusals():
            published = await publish(request_iterator, self._archive, self._control, deltas=self._deltas)
        result = "existed" if published.existed else "new"
        self._metrics.published.labels(published.speculator, result).inc()
        self._metrics.published_bytes.inc(published.num_bytes)
        version = await self._version(published.speculator, published.number)
        return pb.PublishResponse(version=version, existed=published.existed)

    async def Get(self, request: pb.GetRequest, context: Context) -> pb.GetResponse:
        return pb.GetResponse(version=await self._version(check_name(request.speculator), request.version))

    async def List(self, request: pb.ListRequest, context: Context) -> pb.ListResponse:
        name = check_name(request.speculator) if request.speculator else ""
        size = min(request.page_size or _DEFAULT_PAGE, _MAX_PAGE)
        after = _parse_token(request.page_token)
        rows = await self._control.call(self._archive.catalogue.page, name, after=after, size=size)
        names = () if after else (name,) if name else await self._control.names()
        versions = _fitting([wire.version_to_proto(*row, is_full=request.full) for row in rows])
        is_last = len(versions) == len(rows) < size
        return pb.ListResponse(
            versions=versions,
            speculators=[await self._control.state(name) for name in names],
            next_page_token="" if is_last else f"{versions[-1].manifest.speculator}/{versions[-1].version}",
        )

    async def Fetch(  # type: ignore[override] # the generated base knows generators only; grpc.aio takes coroutines too
        self, request: pb.FetchRequest, context: Context
    ) -> None:
        await self._fetching.serve(request, context)

    async def Watch(self, request: pb.WatchRequest, context: Context) -> AsyncIterator[pb.WatchResponse]:
        name, last = check_name(request.speculator), None
        while not self._control.is_closed:
            changed = self._control.changed
            state = await self._control.state(name)
            if state != last:
                last = state
                yield pb.WatchResponse(state=state)
            await changed.wait()

    async def Pin(self, request: pb.PinRequest, context: Context) -> pb.PinResponse:
        reason = _reason(request.reason)
        return pb.PinResponse(state=await self._change(request.speculator, self._archive.pin, request.version, reason))

    async def Unpin(self, request: pb.UnpinRequest, context: Context) -> pb.UnpinResponse:
        reason = _reason(request.reason)
        return pb.UnpinResponse(state=await self._change(request.speculator, self._archive.pin, None, reason))

    async def Pause(self, request: pb.PauseRequest, context: Context) -> pb.PauseResponse:
        pause, reason = partial(self._archive.pause, is_paused=True), _reason(request.reason)
        return pb.PauseResponse(state=await self._change(request.speculator, pause, reason))

    async def Resume(self, request: pb.ResumeRequest, context: Context) -> pb.ResumeResponse:
        resume, reason = partial(self._archive.pause, is_paused=False), _reason(request.reason)
        return pb.ResumeResponse(state=await self._change(request.speculator, resume, reason))

    async def Promote(self, request: pb.PromoteRequest, context: Context) -> pb.PromoteResponse:
        return pb.PromoteResponse(state=await self._act(decision.promote, request))

    async def Reject(self, request: pb.RejectRequest, context: Context) -> pb.RejectResponse:
        return pb.RejectResponse(state=await self._act(decision.reject, request))

    async def Retain(self, request: pb.RetainRequest, context: Context) -> pb.RetainResponse:
        retain = partial(self._archive.retain, is_retained=request.retain)
        await self._change(request.speculator, retain, request.version)
        return pb.RetainResponse(version=await self._version(request.speculator, request.version))

    async def SetPolicy(self, request: pb.SetPolicyRequest, context: Context) -> pb.SetPolicyResponse:
        state = await self._change(request.speculator, self._archive.set_policy, request.policy)
        return pb.SetPolicyResponse(state=state)

    async def History(self, request: pb.HistoryRequest, context: Context) -> pb.HistoryResponse:
        name, limit = check_name(request.speculator), min(request.limit or _DEFAULT_PAGE, _MAX_PAGE)
        history = await self._control.call(self._archive.catalogue.history, name, limit, number=request.version or None)
        return pb.HistoryResponse(transitions=[wire.transition_to_proto(event) for event in history.values()])

    async def ListPods(self, request: pb.ListPodsRequest, context: Context) -> pb.ListPodsResponse:
        name, size = check_name(request.speculator), min(request.page_size or _DEFAULT_PAGE, _MAX_PAGE)
        found = self._control.pods(name, request.pod, after=request.page_token, size=size)
        pods = _fitting(found)
        is_last = bool(request.pod) or len(pods) == len(found) < size
        return pb.ListPodsResponse(pods=pods, next_page_token="" if is_last else pods[-1].pod)

    async def ReportTraining(self, request: pb.ReportTrainingRequest, context: Context) -> pb.ReportTrainingResponse:
        name, message = check_name(request.speculator), _line(request.message, "message")
        _check_learning(request.learning)
        demand = request.demand_tokens_per_second if request.HasField("demand_tokens_per_second") else None
        if demand is not None and not 0.0 <= demand < math.inf:
            raise InvalidInput(f"a demand of {demand} tokens per second")
        self._control.report_training(name, message, request.learning, demand)
        return pb.ReportTrainingResponse()

    async def ForgetTenant(self, request: pb.ForgetTenantRequest, context: Context) -> pb.ForgetTenantResponse:
        name, call = check_name(request.speculator), self._control.call
        tenant = await call(tenants.asked, self._archive, name, request)
        if not tenant:
            raise InvalidInput("a request to forget a tenant must name one")
        order_ms = tenants.order_ms(self._control.now_ms(), await self._forgotten_ms(name))
        await self._control.change(name, self._archive.forget, name, tenant, now_ms=order_ms)
        found = await call(tenants.known, self._archive, name, tenant, await self._forgotten_ms(name))
        return pb.ForgetTenantResponse(tenant=found.tenants[0], incomplete_versions=found.incomplete_versions)

    async def ListTenants(self, request: pb.ListTenantsRequest, context: Context) -> pb.ListTenantsResponse:
        name, call = check_name(request.speculator), self._control.call
        tenant = await call(tenants.asked, self._archive, name, request)
        done_ms = await self._forgotten_ms(name)
        return await call(tenants.known, self._archive, name, tenant, done_ms, after=request.after)

    async def ListForgotten(self, request: pb.ListForgottenRequest, context: Context) -> pb.ListForgottenResponse:
        record = await self._control.call(self._archive.catalogue.tenants.record, check_name(request.speculator))
        orders = [pb.ForgottenTenant(hash=tenant, unix_ms=at_ms) for tenant, at_ms in record.forgotten.items()]
        return pb.ListForgottenResponse(tenants=orders)

    async def _forgotten_ms(self, name: str) -> int:
        """Up to when the trainer has carried out all orders to forget a tenant; 0 if none reports."""
        return (await self._control.state(name)).learning.forgotten_unix_ms

    async def _version(self, name: str, number: int) -> pb.Version:
        version, manifest = await self._control.call(self._archive.catalogue.version, name, number)
        return wire.version_to_proto(version, manifest)

    async def _change(self, name: str, change: Callable[..., None], *args: Any) -> pb.SpeculatorState:
        """Change a speculator now; return its state after the decision that follows."""
        await self._control.change(check_name(name), change, name, *args, now_ms=self._control.now_ms())
        return await self._control.state(name)

    async def _act(self, action: Action, request: pb.PromoteRequest | pb.RejectRequest) -> pb.SpeculatorState:
        name = check_name(request.speculator)
        await self._control.act(name, action, request.version, _reason(request.reason))
        return await self._control.state(name)

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except UpdraftError as error:
            self._metrics.refused.labels(error.status).inc()
            raise
        except asyncio.CancelledError:
            self._metrics.refused.labels("CANCELLED").inc()
            raise


def _reason(text: str) -> str:
    return _line(text, "reason")


def _check_learning(learning: pb.Learning) -> None:
    _line(learning.too_small, "sentence about what is too small")
    _line(learning.device, "name of a device")
    _check_number(learning.phases, "phases of training", _MAX_PHASES)
    for one in learning.phases:
        _line(one.phase, "name of a phase", _MAX_NAME)
    _check_times(learning)
    _check_traffic(learning)
    figures = (
        *(learning.tokens_per_second, learning.flops_utilization, learning.lag_seconds, learning.trained_length),
        *(one.share for one in learning.phases),
        *(one.recent_share for one in learning.kinds),
        *(length for one in learning.kinds for length in (one.candidate_length, one.stable_length)),
    )
    if not all(0.0 <= figure <= _MAX_FIGURE for figure in figures):
        raise InvalidInput(
            f"tokens per second, utilization, shares, lengths and lag of training are from 0 to {_MAX_FIGURE:g}"
        )
    estimate = learning.held_out_length
    high = 0.0 if estimate.high_percent == math.inf else estimate.high_percent  # no bounds yet
    percents = (estimate.change_percent, estimate.low_percent, high)
    if not all(
        abs(figure) <= _MAX_FIGURE for figure in (learning.loss, estimate.candidate, estimate.stable, *percents)
    ):
        raise InvalidInput("loss and held-out acceptance lengths are finite")


def _check_times(learning: pb.Learning) -> None:
    times = (
        *(learning.last_step_unix_ms, learning.last_save_unix_ms, learning.estimate_due_unix_ms),
        *(learning.forgotten_unix_ms, *(shift.unix_ms for shift in learning.shifts)),
    )
    if not all(0 <= unix_ms <= _LAST_MS for unix_ms in times):
        raise InvalidInput("times of training are from 1970 to the year 9999")


def _check_traffic(learning: pb.Learning) -> None:
    _check_number(learning.kinds, "kinds of traffic", _MAX_KINDS)
    _check_number(learning.shifts, "shifts of traffic", _MAX_SHIFTS)
    shifted = (name for shift in learning.shifts for name in (shift.before, shift.after))
    for name in (*(kind.name for kind in learning.kinds), *shifted):
        _line(name, "name of a kind of traffic", _MAX_NAME)
    for kind in learning.kinds:
        if not kind.last_hour <= kind.last_day <= kind.samples + kind.held_out:
            raise InvalidInput("a kind of traffic has more requests of its last hour or day than of all time")


def _check_number(values: Sequence[object], what: str, most: int) -> None:
    if len(values) > most:
        raise InvalidInput(f"{len(values)} {what}; at most {most}")


def _line(text: str, what: str, most: int = _MAX_LINE) -> str:
    if len(text) > most:
        raise InvalidInput(f"a {what} of {len(text)} characters; at most {most}")
    if not text.isprintable():  # terminals show it
        raise InvalidInput(f"a {what} is one line of text, without control characters")
    return text


def _fitting(parts: Sequence[Part]) -> Sequence[Part]:
    """The first versions or pods, as many as fit into one message."""
    totals = accumulate(part.ByteSize() for part in parts)
    return parts[: max(1, sum(total <= _PAGE_BYTES for total in totals))]


def _parse_token(token: str) -> tuple[str, int] | None:
    if not token:
        return None
    name, _, number = token.partition("/")
    if not number.isdecimal() or len(number) > _MAX_DIGITS:
        raise InvalidInput(f"{token[:80]!r} is not a page token of this registry")
    return name, int(number)
