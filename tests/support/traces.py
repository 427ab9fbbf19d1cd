"""Traces of a made-up target whose text follows a rule: the next token is a fixed permutation of the one before.

Hidden states agree with the target's own head, so a draft can learn the rule within seconds; another rule is a shift.
"""

import hashlib
import time
from pathlib import Path

import torch
from torch import Tensor

from updraft.trace.v1 import trace_pb2
from updraft_artifacts.model_folder import target_fingerprint, tokenizer_fingerprint
from updraft_draft import trace_bytes
from updraft_draft.target_weights import read_head
from updraft_draft.tensors import encode
from updraft_trainer.data.sample import SCHEMA, ExpectedTarget

FIRST_TOKEN, NUM_TOKENS = 3, 64
"""The traffic's tokens: within a small draft vocabulary, and after the special ones."""

_START_MS = int(time.time() * 1000)
"""Traces finished when the process started, for those of another time are refused."""

_SHARPNESS = 20.0
"""Length of a last hidden state: its logits then favour one token of a random head by far."""


def rows_first(trace: trace_pb2.Trace) -> bytes:
    """The bytes of a trace as a pod writes them."""
    aux, rest = trace.payload.aux_hidden.data, trace_pb2.Trace.FromString(trace.SerializeToString())
    if aux:
        rest.payload.aux_hidden.ClearField("data")
    return trace_bytes.serialize(rest, aux)


class TraceMaker:
    """Makes traces for the target in a folder."""

    def __init__(self, target: Path) -> None:
        self._head = read_head(target)
        self.target_fingerprint = target_fingerprint(target)
        self.tokenizer_fingerprint = tokenizer_fingerprint(target)

    @property
    def expected(self) -> ExpectedTarget:
        return ExpectedTarget.of(
            self._head.config,
            target_fingerprint=self.target_fingerprint,
            tokenizer_fingerprint=self.tokenizer_fingerprint,
        )

    def trace(
        self,
        seed: int,
        *,
        rule: int = 0,
        evaluation: bool = False,
        domain: str = "",
        num_prompt: int = 4,
        num_output: int = 24,
        payload: bool = True,
        probability: float = 1.0,
        counterfactual_rows: int = 0,
        tenant: int = 0,
        may_train: bool = True,
        finished_ms: int = 0,
        retention_s: int = 0,
    ) -> trace_pb2.Trace:
        """One finished request; the same arguments give the same trace. Every verify step rejects its first draft.
        `finished_ms` 0: about when this process started.

        With `counterfactual_rows` the drafts are as many wrong tokens, which follow the rule, and the payload has their rows.
        """
        ids = _follow(rule, seed, num_prompt + num_output)
        trace = trace_pb2.Trace(
            header=trace_pb2.Header(
                schema=SCHEMA,
                trace_id=trace_id(seed, rule=rule, evaluation=evaluation),
                last_chunk=True,
                speculator="default",
                tenant_hash=tenant,
                policy=trace_pb2.Policy(train=may_train, retain=True, retention_seconds=retention_s),
                target_fingerprint=self.target_fingerprint,
                tokenizer_fingerprint=self.tokenizer_fingerprint,
                finish_reason=trace_pb2.FINISH_REASON_LENGTH,
                finished_unix_ms=finished_ms or _START_MS + seed,
                evaluation=evaluation,
                payload_probability=probability,
                domain=domain,
            ),
            prompt_ids=ids[:num_prompt].tolist(),
            output_ids=ids[num_prompt:].tolist(),
            steps=[trace_pb2.Step(start=start, draft_ids=[FIRST_TOKEN], accepted=0) for start in range(1, num_output)],
        )
        if payload:
            aux, last = self._hidden(ids, seed)
            trace.payload.aux_hidden.CopyFrom(encode(aux, trace_pb2.TENSOR_ENCODING_BF16))
            trace.payload.last_hidden.CopyFrom(encode(last, trace_pb2.TENSOR_ENCODING_BF16))
            if counterfactual_rows:
                self._add_counterfactuals(trace, rule, counterfactual_rows)
        return trace

    def data(self, seed: int, **kwargs: bool | int | float | str) -> bytes:
        """The bytes of a stream entry with `trace(seed, **kwargs)`."""
        return rows_first(self.trace(seed, **kwargs))  # type: ignore[arg-type] # checked by trace itself

    def _add_counterfactuals(self, trace: trace_pb2.Trace, rule: int, count: int) -> None:
        for index, step in enumerate(trace.steps):
            wrong = (trace.output_ids[step.start] - FIRST_TOKEN + 1) % NUM_TOKENS
            ids = _continue(rule, wrong, count + 1)
            del step.draft_ids[:]
            step.draft_ids.extend(ids[:-1].tolist())
            aux, last = self._hidden(ids, index)
            trace.payload.counterfactuals.add(
                step=index,
                aux_hidden=encode(aux, trace_pb2.TENSOR_ENCODING_BF16),
                last_hidden=encode(last, trace_pb2.TENSOR_ENCODING_BF16),
            )

    def _hidden(self, ids: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """For all tokens but the last: aux (the token, the next one, noise) and last hidden states."""
        generator = torch.Generator().manual_seed(seed)
        token, following = (self._head.embedding[part].float() for part in (ids[:-1], ids[1:]))
        head = self._head.head[ids[1:]].float()
        noise = torch.randn(token.shape, generator=generator) * 0.1
        return torch.cat([token, following, noise], -1), _SHARPNESS * head / head.norm(dim=-1, keepdim=True)


def trace_id(seed: int, *, rule: int = 0, evaluation: bool = False) -> bytes:
    """16 bytes that differ for every trace."""
    return hashlib.sha256(f"{seed}/{rule}/{evaluation}".encode()).digest()[:16]


def _follow(rule: int, seed: int, count: int) -> Tensor:
    """`count` tokens from a random first one on."""
    generator = torch.Generator().manual_seed(seed)
    return _continue(rule, int(torch.randint(NUM_TOKENS, (1,), generator=generator)), count)


def _continue(rule: int, first: int, count: int) -> Tensor:
    """`count` tokens from the `first` of the traffic's tokens on, counted from 0."""
    following = torch.randperm(NUM_TOKENS, generator=torch.Generator().manual_seed(rule))
    ids = [first]
    while len(ids) < count:
        ids.append(int(following[ids[-1]]))
    return torch.tensor(ids) + FIRST_TOKEN
