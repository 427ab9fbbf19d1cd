"""A sequence of drafts of 10 MB that differ like consecutive versions of a trainer.

Half of the bytes are a head that is not trained, as in the demo's drafts. The other half are bfloat16 weights with standard
deviation 0.02, whose float32 master gets a normal update per version. The size of the update is chosen so that a delta has
about the same share of the weights as between the demo's versions: 27 to 34 % (bench/delta).
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from tests.support.checkpoints import Checkpoint, checkpoint

HIDDEN = 304
VOCABULARY = 8192
TRAINED = (27 * HIDDEN, HIDDEN)
WEIGHT_STD = 0.02
UPDATE_STD = 0.008


def versions(seed: int) -> Iterator[Checkpoint]:
    """The first version and its successors, without end."""
    rng = np.random.default_rng(seed)
    head = _bfloat16(_normal(rng, (VOCABULARY, HIDDEN), WEIGHT_STD))
    master = _normal(rng, TRAINED, WEIGHT_STD)
    while True:
        yield checkpoint(
            {
                "d2t": ("I64", (VOCABULARY,), np.arange(VOCABULARY, dtype=np.int64).tobytes()),
                "layers.weight": ("BF16", TRAINED, _bfloat16(master)),
                "lm_head.weight": ("BF16", (VOCABULARY, HIDDEN), head),
            }
        )
        master += _normal(rng, TRAINED, UPDATE_STD)


def _normal(rng: np.random.Generator, shape: tuple[int, int], std: float) -> NDArray[np.float32]:
    return rng.standard_normal(shape, dtype=np.float32) * np.float32(std)


def _bfloat16(values: NDArray[np.float32]) -> bytes:
    """Round to nearest, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()
