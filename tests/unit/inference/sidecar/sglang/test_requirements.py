"""Which releases of SGLang are accepted, and how the others are refused."""

import pytest

from updraft_chassis.errors import InvalidInput
from updraft_inference.sidecar.sglang.requirements import is_tested


@pytest.mark.parametrize("version", ["0.5.23", "0.5.23.post1"])
def test_a_tested_release_serves(version: str) -> None:
    assert is_tested(version)


@pytest.mark.parametrize("version", ["0.5.24", "0.6.0", "1.0.0.dev3"])
def test_a_later_release_serves_untested(version: str) -> None:
    assert not is_tested(version)


@pytest.mark.parametrize(
    ("version", "cannot"),
    [
        ("0.5.22", "it cannot report that it is paused"),
        ("0.5.20", "it cannot update the weights of a draft alone, nor report that it is paused"),
        ("0.4.9", "it cannot load plugins by entry point, nor report which version generated which token"),
    ],
)
def test_an_older_one_is_refused_with_what_it_cannot_do(version: str, cannot: str) -> None:
    with pytest.raises(InvalidInput, match=cannot):
        is_tested(version)


@pytest.mark.parametrize("version", ["", "main", "0.5", "v0.5.23"])
def test_what_is_no_release_is_refused(version: str) -> None:
    with pytest.raises(InvalidInput, match="not a release"):
        is_tested(version)
