"""Assigns each sample to a cluster of traffic: the domain that its caller named, or a cluster of similar token counts.

Leader clustering (Hartigan, "Clustering Algorithms", 1975, ch. 3) over hashed token histograms lets replay separate old from
new traffic even if callers name no domains. It compares square roots of counts (Hellinger distance), so that a few frequent
tokens do not dominate. Rejected: hidden states as features, because their large common component makes everything similar;
k-means with restarts, because a sample's cluster must not change after it was stored.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Feature = npt.NDArray[np.float32]
"""float32 [FEATURE_SIZE], of length 1."""

FEATURE_SIZE = 256

MAX_CLUSTERS = 16
"""Limit for named clusters and for content clusters: they share replay, and callers may send any name."""

MIN_SIMILARITY = 0.6
"""A sample whose cosine to every cluster's mean is lower opens a new cluster. With answers, requests of the demo's five domains
have 0.74 to 0.84 to their own mean in the median, and at most 0.69 (ninth tenth) to others. 0.5 took mathematics for chat."""

MAX_OUTLIERS = 4.0
"""A content cluster of fewer samples may give way to a new one when all are taken: one sample in thirty is like no other."""

MAX_NAME_CHARS = 64

_HASH = np.uint64(0x9E3779B97F4A7C15)  # multiplicative hashing by the golden ratio (Knuth, volume 3, section 6.4)
_HASH_SHIFT = np.uint64(64 - (FEATURE_SIZE - 1).bit_length())


def feature(ids: Iterable[int]) -> Feature:
    """The histogram of hashed token ids, square-rooted and normalised."""
    with np.errstate(over="ignore"):
        buckets = (np.fromiter(ids, dtype=np.uint64) * _HASH) >> _HASH_SHIFT
    counts = np.sqrt(np.bincount(buckets.astype(np.intp), minlength=FEATURE_SIZE))
    normalised: Feature = (counts / max(float(np.linalg.norm(counts)), 1e-12)).astype(np.float32)
    return normalised


class Clusters:
    """`named` clusters come from domains; `by_content` holds the sum of the samples' features per content cluster, in order of
    their newest samples."""

    def __init__(self, named: Iterable[str] = (), by_content: dict[str, Feature] | None = None) -> None:
        self.named = set(named)
        self.by_content = dict(by_content or {})

    def assign(self, domain: str, ids: Iterable[int], *, order: int) -> str:
        """The sample's cluster, created if necessary. The mean of a content cluster moves towards the sample.

        A content cluster has the `order` of its first sample in its name, so that no later one ever gets the same name.
        """
        name = f"domain:{domain[:MAX_NAME_CHARS]}"
        if domain and (name in self.named or len(self.named) < MAX_CLUSTERS):
            self.named.add(name)
            return name
        return self._assign_by_content(feature(ids), order)

    def keep_only(self, names: Iterable[str]) -> None:
        """Remove clusters without samples, to make room for new ones."""
        names = set(names)
        self.named &= names
        self.by_content = {name: total for name, total in self.by_content.items() if name in names}

    def _assign_by_content(self, sample: Feature, order: int) -> str:
        similarity = {
            name: float(total @ sample) / max(float(np.linalg.norm(total)), 1e-12)
            for name, total in self.by_content.items()
        }
        nearest = max(similarity, key=lambda name: similarity[name], default=None)
        if nearest is None or similarity[nearest] < MIN_SIMILARITY:
            nearest = self._new_cluster(order, otherwise=nearest)
        self.by_content[nearest] = self.by_content.pop(nearest) + sample
        return nearest

    def _new_cluster(self, order: int, *, otherwise: str | None) -> str:
        """An empty one, for which the oldest of a few outliers makes room if all are taken; `otherwise` if there is none."""
        if len(self.by_content) >= MAX_CLUSTERS:
            few = (name for name, total in self.by_content.items() if float(np.linalg.norm(total)) <= MAX_OUTLIERS)
            oldest = next(few, None)
            if oldest is None:
                assert otherwise is not None, "there are clusters"
                return otherwise
            del self.by_content[oldest]
        name = f"content:{order}"
        self.by_content[name] = np.zeros(FEATURE_SIZE, dtype=np.float32)
        return name
