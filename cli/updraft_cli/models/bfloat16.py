"""bfloat16 in numpy, which has no such type: the upper half of a float32."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def bits(values: NDArray[np.floating[Any]]) -> NDArray[np.uint16]:
    """Round finite numbers to the nearest bfloat16, ties to even, and return its bits, little-endian."""
    wide = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    # Add half a unit of the last kept place, less one bit when that place is even: ties go to even.
    rounded = wide + np.uint32(0x7FFF) + ((wide >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype("<u2")


def are_finite(bits_: NDArray[np.uint16]) -> bool:
    """Whether none of the numbers that bits stand for is NaN or infinite."""
    return bool(((bits_ & np.uint16(0x7F80)) != np.uint16(0x7F80)).all())


def values(bits_: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return the exact numbers that bits stand for."""
    return (bits_.astype(np.uint32) << np.uint32(16)).view(np.float32)
