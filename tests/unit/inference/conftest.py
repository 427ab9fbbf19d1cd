"""What several tests of the torch engine share."""

import shutil

import pytest

from updraft_kernels.loader import Kernels, load_kernels, supported_variants


@pytest.fixture(scope="session")
def compiled() -> Kernels:
    """The C++ kernels that an engine on this CPU uses."""
    kernels = load_kernels()
    if kernels is None:
        is_expected = shutil.which("g++") is not None and supported_variants()
        assert not is_expected, "`make install` should have compiled them"
        pytest.skip("no C++ kernels: there was no g++ at `make install`, or this CPU has no AVX2")
    return kernels


@pytest.fixture(scope="session", params=["torch's operations", "C++ kernels"])
def library(request: pytest.FixtureRequest) -> Kernels | None:
    """What a target may be opened with: first no kernels, then the C++ kernels."""
    return None if request.param == "torch's operations" else request.getfixturevalue("compiled")
