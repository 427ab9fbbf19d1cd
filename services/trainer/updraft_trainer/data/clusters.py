"""Which kind of traffic a sample is: the caller's own name for it, or what its tokens look like.

Leader clustering (Hartigan, "Clustering Algorithms", 1975, ch. 3) over hashed token histograms, so that replay keeps
old traffic apart from new even where nobody names a domain. Square roots of the counts: a few frequent tokens must not
be all that is compared (Hellinger distance). Refused: hidden states as features, whose large common part makes
everything similar; k-means with restarts, for a sample's cluster must not change after it was stored.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Feature = npt.NDArray[np.float32]
"""float32 [FEATURE_SIZE], of length 1."""

FEATURE_SIZE = 256

MAX_CLUSTERS = 16
"""Of each kind, named and found: replay is shared out among them, and callers may send any name."""

MIN_SIMILARITY = 0.5
"""Cosine to a cluster's mean below which a sample opens another. HumanEval and five reasoning-gym tasks, with answers,
have 0.74 to 0.93 to their own mean and 0.56 or less to others; 0.45 to 0.55 keep them apart, 0.6 splits HumanEval."""

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
    """Names of the clusters and, of those that were found by content, the sum of their samples' features."""

    def __init__(self, named: Iterable[str] = (), found: dict[str, Feature] | None = None) -> None:
        self.named = set(named)
        self.found = dict(found or {})

    def assign(self, domain: str, ids: Iterable[int]) -> str:
        """The cluster of a sample, opened if need be; a content cluster's mean moves towards the sample."""
        name = f"domain:{domain[:MAX_NAME_CHARS]}"
        if domain and (name in self.named or len(self.named) < MAX_CLUSTERS):
            self.named.add(name)
            return name
        return self._assign_by_content(feature(ids))

    def forget(self, kept: Iterable[str]) -> None:
        """Drop the clusters that hold no sample any more, which makes room for new ones."""
        kept = set(kept)
        self.named &= kept
        self.found = {name: total for name, total in self.found.items() if name in kept}

    def _assign_by_content(self, seen: Feature) -> str:
        similarity = {
            name: float(total @ seen) / max(float(np.linalg.norm(total)), 1e-12) for name, total in self.found.items()
        }
        nearest = max(similarity, key=lambda name: similarity[name], default=None)
        if nearest is None or (similarity[nearest] < MIN_SIMILARITY and len(self.found) < MAX_CLUSTERS):
            nearest = self._free_name()
            self.found[nearest] = np.zeros(FEATURE_SIZE, dtype=np.float32)
        self.found[nearest] = self.found[nearest] + seen
        return nearest

    def _free_name(self) -> str:
        return next(name for n in range(len(self.found) + 1) if (name := f"content:{n}") not in self.found)
