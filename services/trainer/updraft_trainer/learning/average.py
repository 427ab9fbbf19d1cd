"""The averaged weights of a draft in training, which are what is judged and published, and the last good ones."""

from collections.abc import Mapping

from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from updraft_draft.network import DraftNetwork

MAX_DECAY = 0.98
"""The averaged weights average over at most 50 steps, so that they follow a shift of traffic."""

FITTED_DECAY = MAX_DECAY
"""The least decay after a start from a closed form, whose acceptance falls during the first steps. Between it and the new
weights acceptance is higher than at either end, as before and after fine-tuning (Wortsman et al. 2022, arXiv 2109.01903)."""

TRAINED_DECAY = 0.95
"""The same after a start from a trained draft: over at least 20 steps. With more it would be slower to learn a new kind."""


class AveragedWeights:
    """An average of one network's weights since the last start."""

    def __init__(self, network: DraftNetwork, *, is_kept: bool) -> None:
        """`is_kept`: False at a rank that needs none, whose average is the network itself."""
        self._trained = network
        self._is_kept = is_kept
        self.start(0.0)

    def start(self, least_decay: float) -> None:
        """From the network's weights of now on, which are good. `least_decay`: 0 if they are random."""
        self.least_decay = least_decay
        self.network = self._trained.copy() if self._is_kept else self._trained
        """The draft with averaged weights; what is not trained is shared."""
        self.mark_good()

    def update(self, num_steps: int) -> None:
        """An exponential average. Its horizon is a tenth of the steps since the start, within bounds."""
        if not self._is_kept:
            return
        average, network = ([p for p in one.parameters() if p.requires_grad] for one in (self.network, self._trained))
        decay = min(MAX_DECAY, max(self.least_decay, (1 + num_steps) / (10 + num_steps)))
        get_ema_multi_avg_fn(decay)(average, network, None)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def mark_good(self) -> None:
        """Keep the averaged weights of now."""
        self._good = self.copied() if self._is_kept else {}

    def restore_good(self) -> None:
        """Train from the last good weights on."""
        for network in (self._trained, self.network):
            network.load_state_dict(self._good, strict=False)

    def tensors(self) -> dict[str, Tensor]:
        """By name; they share the memory of the average."""
        return {name: p.detach() for name, p in self.network.named_parameters() if p.requires_grad}

    def copied(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.tensors().items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take these for the average, which are then good, and keep the others."""
        if self._is_kept:
            self.network.load_state_dict(tensors, strict=False)
        self.mark_good()
