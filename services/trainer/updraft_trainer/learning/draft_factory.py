"""Makes the drafts of one target on the device that trains them, and the vocabularies for their teachers."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from updraft_draft.config import DraftConfig
from updraft_draft.network import DraftNetwork, initial_network
from updraft_draft.target_weights import TargetHead
from updraft_trainer.data.teacher import DraftVocabulary
from updraft_trainer.learning.compute import Compute


@dataclass(frozen=True, slots=True)
class DraftFactory:
    """`embedding`: the target's, on the device; all drafts share it. `trains_head`: whether a draft's head is trained."""

    target: TargetHead
    compute: Compute
    embedding: Tensor
    trains_head: bool

    @classmethod
    def of(cls, target: TargetHead, compute: Compute, *, trains_head: bool) -> "DraftFactory":
        return cls(target, compute, target.embedding.to(compute.device), trains_head)

    def initial(self, config: DraftConfig, token_ids: Tensor, seed: int) -> DraftNetwork:
        """A draft with random weights over this vocabulary, on the CPU."""
        target = self.target
        return initial_network(
            config, target.embedding, target.rows(token_ids), target.final_norm, token_ids, seed=seed
        )

    def on_device(self, network: DraftNetwork) -> DraftNetwork:
        """The network to train. A frozen head has the dtype of its computation."""
        head = network.lm_head
        head.requires_grad_(requires_grad=self.trains_head)
        if not self.trains_head:
            head.weight.data = head.weight.data.to(self.compute.dtype)
        network.share(self.embedding)
        return network.to(self.compute.device)

    def vocabulary(self, network: DraftNetwork) -> DraftVocabulary:
        """The vocabulary of a network, for computing its teacher. It shares the network's head if that is not trained and
        equals the target's."""
        c, head = self.target.config, network.lm_head.weight
        vocabulary = DraftVocabulary.of(
            self.target.head,
            network.token_ids.cpu(),
            logit_scale=c.logit_scale,
            logit_cap=c.logit_cap,
            dtype=self.compute.dtype,
        ).to(self.compute.device)
        is_shared = not head.requires_grad and torch.equal(head, vocabulary.head)
        return replace(vocabulary, head=head.detach()) if is_shared else vocabulary
