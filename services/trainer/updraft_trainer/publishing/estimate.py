"""Counts the verify steps that a draft would have needed for a held-out output, by an exact walk of greedy chain decoding.

Rejected: an average over positions, where a long predictable run would count at every position although decoding skips it.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from updraft_draft.network import DraftNetwork
from updraft_draft.precision import autocast, multiplies_bfloat16, product_dtype
from updraft_rollouts.evidence import (
    KIND_CONFIDENCE,
    Gain,
    KindLoss,
    Paired,
    gain,
    weighted,
    worse_kinds,
    worse_tenants,
)
from updraft_trainer.data.clusters import Feature
from updraft_trainer.data.kinds import common_names
from updraft_trainer.data.retention import request_of
from updraft_trainer.data.sample import Sample, checked
from updraft_trainer.data.selection import TrafficMix, mixed


@dataclass(frozen=True, slots=True, kw_only=True)
class GainEstimate:
    """A candidate compared with a baseline on the same held-out requests, in their order."""

    trace_ids: tuple[str, ...]
    domains: tuple[str, ...]
    pairs: tuple[Paired, ...]
    best_steps: Mapping[str, int] = field(default_factory=dict)
    """Verify steps of the draft that was best for a request's kind so far, by trace id; see `BestDrafts`."""

    @property
    def covered(self) -> float:
        """Share of today's traffic whose kinds are among the requests."""
        return sum(pair.weight for pair in self.pairs) / max(1, len(self.pairs))

    def losses(self) -> list[KindLoss]:
        """Kinds of traffic in which the candidate is surely worse, and tenants for whom it is: in today's than the baseline, in
        others than the best draft so far, so that they do not get worse little by little.

        Tenants are judged here and not by the registry, whose readers would otherwise learn which request is whose.
        """
        pairs = [
            pair if pair.weight else replace(pair, baseline_steps=self.best_steps.get(id_, pair.baseline_steps))
            for id_, pair in zip(self.trace_ids, self.pairs, strict=True)
        ]
        return [*worse_kinds(pairs), *worse_tenants(pairs)]

    def lengths(self) -> dict[str, tuple[float, float]]:
        """Acceptance lengths of candidate and baseline by kind of traffic."""
        kinds: dict[str, list[Paired]] = {}
        for pair in self.pairs:
            kinds.setdefault(pair.kind, []).append(pair)
        return {
            kind: (tokens / candidate, tokens / baseline)
            for kind, pairs in kinds.items()
            if (tokens := sum(pair.tokens for pair in pairs))
            and (candidate := sum(pair.candidate_steps for pair in pairs))
            and (baseline := sum(pair.baseline_steps for pair in pairs))
        }

    def without_learned(self, uses: Mapping[str, int]) -> "GainEstimate":
        """Judged only by requests of which no part was trained on: `uses` counts that by trace id. Each kind that still has
        requests keeps its share of today's traffic."""
        learned = {request_of(id_) for id_, num_uses in uses.items() if num_uses}
        kept = [n for n, id_ in enumerate(self.trace_ids) if request_of(id_) not in learned]
        before = Counter(pair.kind for pair in self.pairs)
        after = Counter(self.pairs[n].kind for n in kept)

        def reweighted(pair: Paired) -> Paired:
            share = pair.weight * before[pair.kind] / len(self.pairs)
            return replace(pair, weight=share * len(kept) / after[pair.kind])

        return replace(
            self,
            trace_ids=tuple(self.trace_ids[n] for n in kept),
            domains=tuple(self.domains[n] for n in kept),
            pairs=tuple(reweighted(self.pairs[n]) for n in kept),
        )

    def gain(self, confidence: float) -> Gain | None:
        """For today's mix of traffic; None for fewer than two of its requests."""
        return gain(self.pairs, confidence) if len(weighted(self.pairs)) > 1 else None


def against(candidate: GainEstimate, other: GainEstimate) -> GainEstimate:
    """The candidate compared with another one instead of the baseline, on requests that judged both."""
    steps = dict(zip(other.trace_ids, (pair.candidate_steps for pair in other.pairs), strict=True))
    rows = zip(candidate.trace_ids, candidate.domains, candidate.pairs, strict=True)
    both = [(id_, domain, replace(pair, baseline_steps=steps[id_])) for id_, domain, pair in rows if id_ in steps]
    trace_ids, domains, pairs = zip(*both, strict=True) if both else ((), (), ())
    return GainEstimate(trace_ids=trace_ids, domains=domains, pairs=pairs)


def looks_better(candidate: GainEstimate, other: GainEstimate) -> bool:
    """Whether it looks better for today's traffic, on requests that judged both drafts; no certainty is asked for."""
    gain = against(candidate, other).gain(KIND_CONFIDENCE)
    return gain is not None and gain.percent > 0.0


def is_better(candidate: GainEstimate, other: GainEstimate) -> bool:
    """Whether it looks better and is surely worse in no kind, on requests that judged both drafts.

    Nothing is published for this, so it takes no certainty: a draft in training that looks worse is no better to go on from.
    """
    return looks_better(candidate, other) and not against(candidate, other).losses()


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """The requests of one rank on which a candidate was compared with a baseline, and that rank's traffic."""

    estimate: GainEstimate
    outputs: tuple[tuple[int, int], ...] = ()
    """For each of its requests: tokens of the output, and those of them that the candidate cannot propose."""
    mix: TrafficMix = field(default_factory=TrafficMix)
    means: Mapping[str, Feature] = field(default_factory=dict)
    """Means of that rank's clusters by content."""


def merged(parts: Sequence[Evidence]) -> Evidence:
    """The evidence of all ranks as if one had stored all requests; see `kinds` for those that several ranks have.

    A request that two ranks have, because its shard changed hands, counts once.
    """
    if len(parts) == 1:
        return parts[0]
    mix = mixed([part.mix for part in parts], common_names([part.means for part in parts]))
    rows = {
        id_: (domain, pair, output)
        for part in parts
        for id_, domain, pair, output in zip(
            part.estimate.trace_ids, part.estimate.domains, part.estimate.pairs, part.outputs, strict=True
        )
    }
    trace_ids = tuple(rows)
    pairs = [
        replace(pair, kind=mix.kinds.get(id_, ""), weight=weight)
        for (id_, (_, pair, _)), weight in zip(rows.items(), mix.weights(trace_ids), strict=True)
    ]
    estimate = GainEstimate(
        trace_ids=trace_ids, domains=tuple(domain for domain, _, _ in rows.values()), pairs=tuple(pairs)
    )
    return Evidence(estimate=estimate, outputs=tuple(output for _, _, output in rows.values()), mix=mix)


class BestDrafts:
    """Verify steps of the baseline that was best for each kind of traffic so far, since this process started."""

    def __init__(self) -> None:
        self._steps: dict[str, dict[str, int]] = {}

    def update(self, estimate: GainEstimate) -> Mapping[str, int]:
        """Compare the baseline with the best of each kind, on the requests that both have walked; return the steps of the
        best by trace id. Kinds without a request are forgotten, because names of kinds are never used again."""
        kinds: dict[str, dict[str, int]] = {}
        for trace_id, pair in zip(estimate.trace_ids, estimate.pairs, strict=True):
            kinds.setdefault(pair.kind, {})[trace_id] = pair.baseline_steps
        self._steps = {kind: steps for kind, steps in self._steps.items() if kind in kinds}
        for kind, steps in kinds.items():
            best = {id_: n for id_, n in self._steps.get(kind, {}).items() if id_ in steps}
            is_best = sum(steps[id_] for id_ in best) <= sum(best.values())
            self._steps[kind] = steps if is_best else best
        return {id_: n for steps in self._steps.values() for id_, n in steps.items()}


def verify_steps(
    network: DraftNetwork, samples: Sequence[Sample], *, lookahead: int, check: Callable[[], None] = lambda: None
) -> list[int]:
    """Verify steps per sample that greedy decoding with `lookahead` drafts needs for the output after its first token.

    `check` is called before each sample, and may end the work by an exception.
    """
    return [len(steps) for steps in walk(network, checked(samples, check), lookahead=lookahead)]


@torch.no_grad()
def walk(network: DraftNetwork, samples: Iterable[Sample], *, lookahead: int) -> list[list[int]]:
    """Accepted drafts of each of those verify steps, per sample."""
    steps, weight = [], network.fc.weight
    if weight.dtype == torch.bfloat16 and not multiplies_bfloat16(weight.device):
        network = network.widened()
    for sample in samples:
        with autocast(weight.device):
            hits = _hits(network, sample, lookahead)
        steps.append(_walk(hits, first=sample.first_output, last=sample.num_rows))
    return steps


def num_tokens(sample: Sample) -> int:
    """Output tokens from verify steps: all but the first, which comes from prefill."""
    return sample.num_rows - sample.first_output


def compare(
    samples: Sequence[Sample], candidate: Sequence[int], baseline: Sequence[int] | None, mix: TrafficMix
) -> GainEstimate:
    """Pair the steps of both. Without `baseline`, decoding runs without a draft: one token per step."""
    trace_ids = tuple(sample.trace_id for sample in samples)
    tokens = [num_tokens(sample) for sample in samples]
    rows = zip(samples, mix.weights(trace_ids), tokens, candidate, baseline or tokens, strict=True)
    return GainEstimate(
        trace_ids=trace_ids,
        domains=tuple(sample.domain for sample in samples),
        pairs=tuple(
            Paired(
                tokens=num,
                candidate_steps=steps,
                baseline_steps=before,
                kind=mix.kinds.get(sample.trace_id, ""),
                weight=weight,
                tenant=sample.tenant_text,
            )
            for sample, weight, num, steps, before in rows
        ),
    )


def _hits(network: DraftNetwork, sample: Sample, lookahead: int) -> Tensor:
    """bool [R + 1, lookahead]: whether draft j, proposed when token c (the row) is the newest, is the token c + 1 + j."""
    rows = sample.num_rows
    first_row = max(0, sample.first_output - 1)
    ids = torch.cat([sample.ids[1:], torch.zeros(lookahead, dtype=torch.long)])[None, : rows + lookahead - 1]
    device = network.fc.weight.device
    aux = sample.aux.decoded().to(device, product_dtype(device))
    states = network.unroll(aux[None], ids.to(device), num_steps=lookahead, first_row=first_row)
    hits = torch.zeros(rows + 1, lookahead, dtype=torch.bool)
    for j, state in enumerate(states):
        drafts = network.token_ids[network.logits(state[0]).argmax(-1)].cpu()
        actual = sample.ids[first_row + 2 + j :]
        count = min(len(actual), len(drafts))
        hits[first_row + 1 : first_row + 1 + count, j] = drafts[:count] == actual[:count]
    return hits


def _walk(hits: Tensor, *, first: int, last: int) -> list[int]:
    """Accepted drafts of each verify step from token `first` to token `last`, without drafting beyond `last`."""
    num_accepted = hits.long().cumprod(-1).sum(-1).tolist()
    token, accepted = first, []
    while token < last:
        accepted.append(min(num_accepted[token], last - token - 1))
        token += 1 + accepted[-1]
    return accepted
