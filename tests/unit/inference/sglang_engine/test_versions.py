"""Which SGLang serves, and what is said of the others."""

import pytest

from updraft_chassis.errors import InvalidInput
from updraft_inference.sglang_engine.versions import support


@pytest.mark.parametrize("version", ["0.5.23", "0.5.23.post1"])
def test_a_tested_release_serves(version: str) -> None:
    assert support(version).is_tested


@pytest.mark.parametrize("version", ["0.5.24", "0.6.0", "1.0.0.dev3"])
def test_a_later_release_serves_untested(version: str) -> None:
    assert not support(version).is_tested


@pytest.mark.parametrize(
    ("version", "cannot"),
    [
        ("0.5.22", "it cannot say that it is paused"),
        ("0.5.20", "it cannot update the weights of a draft alone, nor say that it is paused"),
        ("0.4.9", "it cannot load plugins by entry point, nor say which version gave which token"),
    ],
)
def test_an_older_one_is_refused_with_what_it_cannot_do(version: str, cannot: str) -> None:
    with pytest.raises(InvalidInput, match=cannot):
        support(version)


@pytest.mark.parametrize("version", ["", "main", "0.5", "v0.5.23"])
def test_what_is_no_release_is_refused(version: str) -> None:
    with pytest.raises(InvalidInput, match="no release"):
        support(version)
