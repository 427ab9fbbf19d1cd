"""The samples to train on and those to judge by, split by request. Samples stay on disk; here are their places.

Requests with equal prompts are on the same side. What pods held out for evaluation is never trained on, so that a trainer
can still judge by it. Each text is used once.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from updraft.trace.v1 import trace_pb2
from updraft_chassis.errors import Conflict, Corrupt, InvalidInput, NotFound
from updraft_chassis.progress import Progress, Report
from updraft_chassis.tenants import hashes
from updraft_trainer.data.retention import rank, request_of
from updraft_trainer.data.sample import ExpectedTarget, RefusedTrace, Sample, read_sample
from updraft_trainer.offline.folders import StoredTrace, stored_traces

JUDGE_EVERY = 8
"""One request of so many is held out."""
MAX_JUDGES = 256
"""Held-out requests at most: more hardly narrow the estimate, and each costs a forward pass."""
MIN_PROMPTS = 2 * JUDGE_EVERY

_REPORT_EVERY = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """The place of a sample. `prompt` names all requests of the same prompt."""

    trace: StoredTrace
    trace_id: str
    prompt: bytes
    is_evaluation: bool
    num_bytes: int
    """In memory."""
    tenants: frozenset[str] = frozenset()
    """Hashes of the tenants that sent this text, in hexadecimal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    training: Sequence[Item]
    held_out: Sequence[Item]
    expected: ExpectedTarget
    refused: Counter[str]
    """Number of traces that are not used, by reason."""
    gone: set[str] = field(default_factory=set)
    """Trace ids of samples that could no longer be read."""

    @property
    def digest(self) -> str:
        """Identifies which samples are on which side."""
        sides = [[item.trace_id for item in side] for side in (self.training, self.held_out)]
        return hashlib.sha256(repr(sides).encode()).hexdigest()

    def read(self, items: Iterable[Item]) -> list[Sample]:
        """The samples, without those that were damaged or removed since they were found, which join `gone`."""
        samples = []
        for item in items:
            try:
                samples.append(read_sample(item.trace.read(), self.expected, is_checked=True))
            except (Corrupt, NotFound, RefusedTrace):
                self.gone.add(item.trace_id)
        return samples


@dataclass(slots=True)
class _Found:
    items: dict[bytes, Item] = field(default_factory=dict)
    """By text."""
    refused: Counter[str] = field(default_factory=Counter)
    prompts: dict[str, bytes] = field(default_factory=dict)
    """By request, for those whose first chunk was found."""


def read_dataset(folders: Sequence[Path], expected: ExpectedTarget, report: Report) -> Dataset:
    """Check all traces of these folders. InvalidInput if too few can be learned from, Conflict if one is of another target."""
    found = _Found()
    traces = [
        trace for folder in folders for trace in stored_traces(folder, target_fingerprint=expected.target_fingerprint)
    ]
    for n, trace in enumerate(traces):
        if n % _REPORT_EVERY == 0:
            report(Progress(activity="reading traces", done=n, total=len(traces)))
        try:
            _add(found, trace, expected)
        except (Corrupt, NotFound):
            found.refused["it is damaged"] += 1
        except RefusedTrace as error:
            if error.label == "other_target":
                raise Conflict(f"{_names(folders)} holds traces of another model: {error}") from error
            found.refused[str(error)] += 1
    items = [_with_prompt(item, found.prompts) for item in found.items.values()]
    num_prompts = len({item.prompt for item in items} - _sealed(items))
    if num_prompts < MIN_PROMPTS:
        raise InvalidInput(_too_few(folders, num_prompts, found.refused))
    training, held_out = _split(items)
    return Dataset(training=training, held_out=held_out, expected=expected, refused=found.refused)


def _add(found: _Found, stored: StoredTrace, expected: ExpectedTarget) -> None:
    data = stored.read()
    sample = read_sample(data, expected)
    trace = trace_pb2.Trace.FromString(data)
    prompt = hashlib.sha256(repr(list(trace.prompt_ids)).encode()).digest()
    if trace.header.chunk == 0:
        found.prompts[sample.trace_id] = prompt
    text = hashlib.sha256(sample.ids.numpy().tobytes()).digest()
    tenants = frozenset(filter(None, [hashes.text(sample.tenant)]))
    if (same := found.items.get(text)) is not None:
        found.refused["another one has the same text"] += 1
        is_evaluation = same.is_evaluation or sample.is_evaluation
        found.items[text] = replace(same, is_evaluation=is_evaluation, tenants=same.tenants | tenants)
        return
    found.items[text] = Item(
        trace=stored,
        trace_id=sample.trace_id,
        prompt=prompt,
        is_evaluation=sample.is_evaluation,
        num_bytes=sample.num_bytes,
        tenants=tenants,
    )


def _with_prompt(item: Item, prompts: dict[str, bytes]) -> Item:
    """A later chunk has only the end of its prompt: it goes with the first one, or else with the others of its request."""
    request = request_of(item.trace_id)
    return replace(item, prompt=prompts.get(request, request.encode()))


def _sealed(items: Iterable[Item]) -> set[bytes]:
    """Prompts that pods held out a request of."""
    return {item.prompt for item in items if item.is_evaluation}


def _split(items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
    """Hold out whole prompts: those that pods held out, and others until one request of `JUDGE_EVERY` is."""
    requests: dict[bytes, set[str]] = {}
    for item in items:
        requests.setdefault(item.prompt, set()).add(request_of(item.trace_id))
    wanted = -(-sum(map(len, requests.values())) // JUDGE_EVERY)
    wanted = min(MAX_JUDGES, wanted)
    held_out = {request for prompt in _sealed(items) for request in requests[prompt]}
    for prompt in sorted(requests):  # a digest, so in a random order that is always the same
        if len(held_out | requests[prompt]) <= wanted:
            held_out |= requests[prompt]
    training = [item for item in items if request_of(item.trace_id) not in held_out]
    return training, _judges([item for item in items if request_of(item.trace_id) in held_out])


def _judges(held_out: Sequence[Item]) -> list[Item]:
    """A random chunk of each request, and random requests if there are too many; the same each time."""
    by_rank = sorted(held_out, key=lambda item: rank(item.trace_id), reverse=True)
    chunks = {request_of(item.trace_id): item for item in by_rank}
    return [chunks[request] for request in sorted(chunks, key=rank)[:MAX_JUDGES]]


def _too_few(folders: Sequence[Path], num_prompts: int, refused: Counter[str]) -> str:
    reasons = f" ({refusals(refused)})" if refused else ""
    found = f"{_names(folders)} holds {num_prompts} prompts to learn from, fewer than {MIN_PROMPTS}{reasons}"
    return f"{found}: record more requests"


def refusals(refused: Counter[str], count: int = 3) -> str:
    """The most frequent reasons, in words."""
    return "; ".join(f"{num:,} not used because {reason}" for reason, num in refused.most_common(count))


def _names(folders: Sequence[Path]) -> str:
    return " and ".join(map(str, folders))
