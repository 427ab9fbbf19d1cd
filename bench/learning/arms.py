"""The arms that are compared: how each chooses samples, learns from them and publishes."""

from dataclasses import dataclass, field, replace

from updraft_trainer.learning.learner import Hyperparameters
from updraft_trainer.publishing.decision import PublishThresholds


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """Defaults are the product's. `steps_per_request` is the ratio of training to traffic."""

    name: str
    hyper: Hyperparameters = field(default_factory=Hyperparameters)
    batch_tokens: int | None = None
    """Tokens of an optimizer step; None: four samples on average."""
    max_uses: int = 6
    steps_per_request: float = 1.5
    evaluation_every: int = 10
    """Every so many requests one is held out by the arm itself; 0: none."""
    evaluate_steps: int = 20
    publish_every: int = 0
    """Requests between two publications that need no evidence; 0: the trainer's gate decides."""
    is_averaged: bool = True
    """Averaged weights are evaluated and published, not those of the last step."""
    has_closed_form: bool = True
    """Start in closed form, and let drafts in closed form compete when traffic has doubled or a new kind came."""
    starts_surely: bool = False
    """Training goes on from a closed form only if that is surely better, not as soon as it looks better."""
    follows_vocabulary: bool = True
    """Choose a draft vocabulary with each draft in closed form, not only before the first."""
    num_waiting: int = 8
    """The newest samples judge the draft next to held-out ones before they are trained on; 0: only held-out ones judge."""
    fifo_samples: int = 0
    """So many samples a step, each once and in order, instead of fresh ones beside rehearsal; 0: as the trainer does."""
    thresholds: PublishThresholds = field(
        default_factory=lambda: PublishThresholds(
            min_samples=8, min_gain_percent=1.0, min_first_gain_percent=15.0, confidence=0.9
        )
    )


OURS = Arm(name="ours")
"""As `updraft up` trains."""

NO_AVERAGE = replace(OURS, name="no-average", is_averaged=False)
ONLY_HELD_OUT = replace(OURS, name="only-held-out", num_waiting=0)
NO_CLOSED_FORM = replace(OURS, name="no-closed-form", has_closed_form=False)
FIXED_VOCABULARY = replace(OURS, name="fixed-vocabulary", follows_vocabulary=False)
NO_CORRECTIONS = replace(OURS, name="no-corrections", hyper=Hyperparameters(correction_weight=0.0))
ACCEPTANCE = replace(OURS, name="acceptance", hyper=Hyperparameters(correction_weight=0.0, acceptance_weight=1.0))
REVERSE_KL = replace(OURS, name="reverse-kl", hyper=Hyperparameters(loss="reverse_kl"))
MORE_STEPS = replace(OURS, name="more-steps", steps_per_request=3.0, max_uses=12)
SURE_START = replace(OURS, name="sure-start", starts_surely=True)
DOUBLE_RATE = replace(OURS, name="double-rate", hyper=Hyperparameters(adaptation_rate=3e-4))
HIGH_RATE = replace(OURS, name="high-rate", hyper=Hyperparameters(adaptation_rate=1e-3))

SHIPPED = replace(
    OURS, name="shipped", is_averaged=False, has_closed_form=False, follows_vocabulary=False, num_waiting=0
)
"""As Updraft trained before this benchmark: random first weights, and the weights of the last step."""

AURORA = Arm(
    name="aurora",
    hyper=Hyperparameters(
        learning_rate=1e-4,
        warmup_steps=1,
        clip_norm=0.5,
        ttt_steps=5,
        correction_weight=0.0,
        trains_head=True,
    ),
    max_uses=1,
    steps_per_request=1 / 8,
    evaluation_every=0,
    publish_every=400,
    is_averaged=False,
    has_closed_form=False,
    follows_vocabulary=False,
    num_waiting=0,
    fifo_samples=8,
)
"""As Together's released code trains: forward KL, first in first out, each sample once, a swap every 400 requests."""

ONLY_CORRECTIONS = 1e6
"""Weight of corrected tokens beside which the others do not count."""

OSD = replace(SHIPPED, name="osd", hyper=Hyperparameters(correction_weight=ONLY_CORRECTIONS))
"""Online Speculative Decoding (arXiv 2310.07177): only tokens that replaced a rejected draft are learnt."""

ARMS = {
    arm.name: arm
    for arm in (
        OURS,
        NO_AVERAGE,
        ONLY_HELD_OUT,
        NO_CLOSED_FORM,
        FIXED_VOCABULARY,
        NO_CORRECTIONS,
        ACCEPTANCE,
        REVERSE_KL,
        MORE_STEPS,
        SURE_START,
        DOUBLE_RATE,
        HIGH_RATE,
        SHIPPED,
        AURORA,
        OSD,
    )
}
