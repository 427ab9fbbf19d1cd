"""What several tests of the torch engine share."""

import ctypes

import pytest

from updraft_inference.torch_engine import kernels


@pytest.fixture(scope="session")
def compiled() -> ctypes.CDLL:
    """The engine's own kernels."""
    library = kernels.load(kernels.default_folder())
    if library is None:
        pytest.skip("the engine's kernels are compiled with g++")
    return library


@pytest.fixture(scope="session", params=["operations of torch", "kernels of ours"])
def library(request: pytest.FixtureRequest) -> ctypes.CDLL | None:
    """What a target may be opened with: once nothing, once the kernels."""
    return None if request.param == "operations of torch" else request.getfixturevalue("compiled")
