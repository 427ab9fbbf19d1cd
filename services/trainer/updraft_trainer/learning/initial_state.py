"""Where a draft in training comes from: the saved state, else the registry's draft, else new weights.

A lineage that exists is continued, for engines cannot swap to another vocabulary; so a trainer without a state asks the
registry before it starts one, and waits for the answer. Drafts that were all rejected are no lineage: nothing ever served
them, and their weights may be gone.
"""

import asyncio
import dataclasses
import hashlib
import json
import logging
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from updraft_chassis.errors import Conflict, Exhausted, Forbidden, NotFound, Unauthenticated, Unavailable
from updraft_chassis.lifecycle import Stop
from updraft_draft import checkpoint, vocabulary
from updraft_draft.config import DraftConfig, check_fits
from updraft_draft.target_weights import TargetHead
from updraft_trainer.data.replay import Replay
from updraft_trainer.learning.learner import Hyper, Learner
from updraft_trainer.learning.state import State, TrainingHistory
from updraft_trainer.publishing.registry_view import RegistryView, RolloutState

logger = logging.getLogger(__name__)

_WAIT_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerSpec:
    """How a draft is made when there is none, and how it learns."""

    target: TargetHead
    target_fingerprint: str
    hyper: Hyper
    draft_vocab_size: int
    first_samples: int
    seed: int

    @property
    def config_digest(self) -> str:
        """ "sha256:..." of everything here that changes what is learnt."""
        content = dataclasses.asdict(self.hyper) | {"draft_vocab_size": self.draft_vocab_size, "seed": self.seed}
        return f"sha256:{hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}"

    def learner(self, token_ids: Tensor, config: DraftConfig | None = None) -> Learner:
        """A learner with first weights over this vocabulary; `config`: of a draft that has its own shape."""
        config = config or self.target.config.draft(draft_vocab_size=len(token_ids))
        return Learner(self.target, config, token_ids, self.hyper, seed=self.seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class InitialState:
    """What training starts or goes on with."""

    learner: Learner
    progress: TrainingHistory
    rng: random.Random


def resume(state: State, design: TrainerSpec) -> InitialState:
    """Go on from a saved state, with today's settings of how to learn. Conflict if they do not fit it."""
    if state.config_digest != design.config_digest:
        logger.warning("Settings of learning changed since the state was saved; they apply from here on")
    learner = design.learner(state.token_ids, state.draft_config)
    try:
        learner.load_state_dict(state.learner)
    except (ValueError, RuntimeError) as error:  # torch's words for groups or shapes that differ
        raise Conflict(
            f"the saved state does not fit these settings ({error});"
            " restore UPDRAFT_TRAINER_TRAINS_HEAD or set UPDRAFT_TRAINER_DATA_DIR to another folder"
        ) from error
    rng = random.Random()
    rng.setstate(state.rng)
    logger.info("Resumed", extra={"step": learner.step, "samples": state.progress.num_samples})
    return InitialState(learner=learner, progress=state.progress, rng=rng)


async def begin(design: TrainerSpec, drafts: RegistryView, replay: Replay, stop: Stop) -> InitialState | None:
    """Start from the registry's draft, or from nothing once there is some traffic; None if `stop` came first.

    Needs `drafts.follow` and intake to run meanwhile. Conflict if the registry's drafts are for another target.
    """
    outlook = await _answer(drafts, stop)
    if outlook is None:
        return None
    outlook.check_target(design.target_fingerprint)
    basis = outlook.basis
    learner = await (_adopt(design, drafts, basis, stop) if basis else _start(design, replay, stop))
    if learner is None:
        return None
    return InitialState(learner=learner, progress=TrainingHistory(), rng=random.Random(design.seed))


async def _answer(drafts: RegistryView, stop: Stop) -> RolloutState | None:
    while drafts.outlook is None:
        if await stop.wait(_WAIT_S):
            return None
    return drafts.outlook


async def _adopt(design: TrainerSpec, drafts: RegistryView, version: int, stop: Stop) -> Learner | None:
    """A learner that goes on from a published version."""
    while not stop.requested:
        try:
            folder = await drafts.fetch(version)
        except NotFound as error:
            raise Conflict(
                f"there is no draft of this speculator left to go on from ({error});"
                " publish one that serves, or set UPDRAFT_TRAINER_SPECULATOR to a new name"
            ) from error
        except (Unavailable, Unauthenticated, Forbidden, Exhausted, OSError) as error:
            logger.warning("Waiting for the draft to start from: %s", error, extra={"version": version})
            await stop.wait(_WAIT_S)
        else:
            learner = await asyncio.to_thread(_read, design, folder)
            logger.info("Started from a published draft", extra={"version": version})
            return learner
    return None


def _read(design: TrainerSpec, folder: Path) -> Learner:
    config, tensors = checkpoint.load(folder)
    reason = check_fits(config, design.target.config)
    if reason is not None:
        raise Conflict(f"the draft in {folder} is not for this trainer's target: {reason}")
    learner = design.learner(tensors["d2t"] + torch.arange(config.draft_vocab_size), config)
    learner.network.load_state_dict(tensors)
    learner.mark_good()
    return learner


async def _start(design: TrainerSpec, replay: Replay, stop: Stop) -> Learner | None:
    """A learner with new weights, whose vocabulary the first samples chose."""
    while len(replay.training_ids()) < design.first_samples:
        if await stop.wait(_WAIT_S):
            return None
    count = max(1, design.first_samples)
    samples = replay.training_batch({}, count=count, max_uses=1, rng=random.Random(design.seed))
    target = design.target.config
    token_ids = vocabulary.choose(
        (sample.ids for sample in samples),
        always=target.eos_token_ids,
        vocab_size=target.vocab_size,
        size=design.draft_vocab_size,
    )
    learner = await asyncio.to_thread(design.learner, token_ids)
    logger.info("Started a new draft", extra={"draft_vocab_size": len(token_ids)})
    return learner
