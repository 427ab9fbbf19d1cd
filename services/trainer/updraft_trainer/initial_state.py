"""Where training starts: from the saved state, or else the registry's draft, or else new weights.

Published drafts are continued, because they know more than a new one, and not every engine can swap between shapes. A trainer
without a saved state therefore waits for the registry's response before it starts a new draft. Drafts that were rejected do
not count: no pod ever served them, and their weights may have been deleted. Neither does a draft that no pod could load.
"""

import asyncio
import dataclasses
import hashlib
import json
import logging
import random
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from updraft_artifacts.draft_shape import ShapeChoice
from updraft_chassis.errors import Conflict, Exhausted, Forbidden, NotFound, Unauthenticated, Unavailable
from updraft_chassis.lifecycle import Stop
from updraft_chassis.tenants import hashes
from updraft_draft import checkpoint
from updraft_draft.config import DraftConfig, check_fits
from updraft_draft.network import DraftNetwork
from updraft_draft.target_weights import TargetHead
from updraft_trainer.coordination.watch import Activity
from updraft_trainer.data.frequency import choose_vocabulary
from updraft_trainer.data.replay import Replay
from updraft_trainer.data.retention import Pool
from updraft_trainer.data.sample import Sample
from updraft_trainer.learning.compute import Compute
from updraft_trainer.learning.learner import Hyperparameters, Learner
from updraft_trainer.publishing.registry_view import RegistryView, provenance_of
from updraft_trainer.states.state import State, TrainingHistory

logger = logging.getLogger(__name__)

RANDOM, CLOSED_FORM = "random weights", "closed form"
"""Origins of drafts that come from no other draft."""

_WAIT_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerSpec:
    """How a new draft is created, and how it is trained."""

    target: TargetHead
    target_fingerprint: str
    hyper: Hyperparameters
    shape: ShapeChoice
    first_samples: int
    seed: int
    compute: Compute = field(default_factory=Compute)
    """Has no influence on what is learned, but for rounding."""

    @property
    def config_digest(self) -> str:
        """ "sha256:..." of all settings that influence training."""
        content = dataclasses.asdict(self.hyper) | dataclasses.asdict(self.shape) | {"seed": self.seed}
        return f"sha256:{hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}"

    @property
    def draft_config(self) -> DraftConfig:
        """The config of new drafts: of the chosen shape."""
        return self.target.draft(self.shape)

    def new_learner(self, samples: Sequence[Sample], *, check: Callable[[], None] = lambda: None) -> Learner:
        """A learner with random weights of the chosen shape, over the most frequent tokens of these samples.

        `check` is called before each part of the work, and may end it by an exception.
        """
        size = self.draft_config.draft_vocab_size
        return self.learner(choose_vocabulary(samples, self.target, size=size, check=check))

    def learner(self, token_ids: Tensor, config: DraftConfig | None = None) -> Learner:
        """A learner with initial weights over this vocabulary. `config` defaults to the chosen shape."""
        config = config or self.target.draft(self.shape, draft_vocab_size=len(token_ids))
        return Learner(self.target, config, token_ids, self.hyper, compute=self.compute, seed=self.seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Elsewhere:
    """Requests that other ranks store: how many there are, and a sample of each of up to so many."""

    num_requests: Callable[[], int] = lambda: 0
    samples: Callable[[int], Sequence[Sample]] = lambda _: ()


_ALONE = Elsewhere()


@dataclass(frozen=True, slots=True, kw_only=True)
class InitialState:
    learner: Learner
    history: TrainingHistory
    rng: random.Random
    fit_s: float = 0.0
    """Time for a new draft's vocabulary and weights."""
    counted: Collection[str] | None = None
    """The data folders whose samples `history` counts: the draft may have learned from all that others stored before their
    process started. None: it has learned from nothing else."""
    saved_s: float | None = None
    """Unix time of the saved state that holds it; None if there is none."""


def resume(state: State, spec: TrainerSpec) -> InitialState:
    """Continue from a saved state with the current settings. Conflict if they do not fit it."""
    if state.config_digest != spec.config_digest:
        logger.warning("Training settings have changed since the state was saved; the new ones apply from now on")
    learner = spec.learner(state.token_ids, state.draft_config)
    try:
        learner.load_state_dict(state.learner)
    except (ValueError, RuntimeError) as error:  # torch's errors for different parameter groups or shapes
        raise Conflict(
            f"the saved state does not fit these settings ({error});"
            " restore UPDRAFT_TRAINER_TRAINS_HEAD or set UPDRAFT_TRAINER_DATA_DIR to another folder"
        ) from error
    rng = random.Random()
    rng.setstate(state.rng)
    logger.info("Resumed", extra={"step": learner.step, "samples": state.history.num_samples})
    return InitialState(
        learner=learner, history=state.history, rng=rng, counted=state.history.folders, saved_s=state.taken_s
    )


async def start(
    spec: TrainerSpec,
    registry: RegistryView,
    replay: Replay,
    stop: Stop,
    *,
    busy: Callable[[Activity], None] = lambda _: None,
    elsewhere: Elsewhere = _ALONE,
) -> InitialState | None:
    """Start from the registry's draft, or from new weights once there is some traffic; None if `stop` came first.

    `busy` is told what is done as soon as there is no more to wait for. `registry.run` and intake must run at the same time.
    Conflict if the registry's drafts are for another target.
    """
    while registry.state is None:
        if await stop.wait(_WAIT_S):
            return None
    registry.state.check_target(spec.target_fingerprint)
    version = registry.state.start_version
    history = TrainingHistory()
    if version:
        history.origin = f"version {version}"
        learner = await _continue_draft(spec, registry, version, history, stop)
        rng = random.Random(spec.seed)
        return InitialState(learner=learner, history=history, rng=rng, counted=()) if learner else None
    samples = await _first_samples(spec, registry, replay, stop, elsewhere)
    if samples is None:
        return None
    busy(Activity.FIRST_DRAFT)
    return await _new_draft(spec, registry, samples, history, stop)


async def _continue_draft(
    spec: TrainerSpec, registry: RegistryView, version: int, history: TrainingHistory, stop: Stop
) -> Learner | None:
    """The learner; the tenants that the draft has learned from are added to `history`."""
    while not stop.requested:
        try:
            folder = await registry.fetch(version)
        except NotFound as error:
            raise Conflict(
                f"this speculator has no draft left to start from ({error});"
                " publish one that serves, or set UPDRAFT_TRAINER_SPECULATOR to a new name"
            ) from error
        except (Unavailable, Unauthenticated, Forbidden, Exhausted, OSError) as error:
            logger.warning("Waiting for the draft to start from: %s", error, extra={"version": version})
            await stop.wait(_WAIT_S)
        else:
            learner = await asyncio.to_thread(_load, spec, folder)
            origin = provenance_of(folder)
            history.learn_from(map(hashes.text, origin.tenants), has_more=origin.has_more_tenants)
            logger.info("Started from a published draft", extra={"version": version})
            return learner
    return None


def _load(spec: TrainerSpec, folder: Path) -> Learner:
    config, tensors = checkpoint.load(folder)
    reason = check_fits(config, spec.target.config)
    if reason is not None:
        raise Conflict(f"the draft in {folder} is not for this trainer's target: {reason}")
    learner = spec.learner(tensors["d2t"] + torch.arange(config.draft_vocab_size), config)
    learner.start_from(tensors)
    return learner


async def _first_samples(
    spec: TrainerSpec, registry: RegistryView, replay: Replay, stop: Stop, elsewhere: Elsewhere
) -> Sequence[Sample] | None:
    """A sample of each of the first requests of all ranks; None if `stop` came first."""
    count, rng = spec.first_samples, random.Random(spec.seed)

    def find() -> list[Sample]:
        own = replay.first_batch(count=count, rng=rng)
        return [*own, *elsewhere.samples(count - len(own))][:count]

    while True:
        num_found = replay.num_requests(Pool.WINDOW, Pool.RESERVOIR) + elsewhere.num_requests()
        if num_found >= count:  # other ranks send whole samples, so they are asked once there are enough
            samples = await asyncio.to_thread(find)
            if len(samples) == count:
                return samples
            num_found = len(samples)  # a stored one is damaged
        registry.set_message(f"a first draft waits for {count} requests to learn from, has {num_found}")
        if await stop.wait(_WAIT_S):
            return None


async def _new_draft(
    spec: TrainerSpec, registry: RegistryView, samples: Sequence[Sample], history: TrainingHistory, stop: Stop
) -> InitialState:
    """A learner whose weights and vocabulary come from these samples.

    Weights are random if no sample tells the target's last hidden states or its logits, and the vocabulary is the lowest token
    ids if there is no sample. Samples that the weights come from are counted as used. Raises Stopped.
    """
    registry.set_message(f"a first draft is being made from {len(samples)} requests: its vocabulary, then its weights")
    start_s = time.monotonic()
    learner, draft = await asyncio.to_thread(_fit, spec, samples, stop)  # minutes for a large target
    history.origin = RANDOM if draft is None else CLOSED_FORM
    history.learn_from(sample.tenant_text for sample in samples)
    if draft is not None:
        await asyncio.to_thread(learner.start_from_fit, draft)
        history.count_uses(sample.trace_id for sample in samples)
    fit_s = time.monotonic() - start_s
    facts = {"draft_vocab_size": len(learner.network.token_ids), "is_closed_form": draft is not None, "seconds": fit_s}
    logger.info("Started a new draft", extra=facts)
    return InitialState(learner=learner, history=history, rng=random.Random(spec.seed), fit_s=fit_s)


def _fit(spec: TrainerSpec, samples: Sequence[Sample], stop: Stop) -> tuple[Learner, DraftNetwork | None]:
    """A learner with random weights and the draft in closed form, if there is one."""
    learner = spec.new_learner(samples, check=stop.check)
    return learner, learner.closed_form(samples, check=stop.check)
