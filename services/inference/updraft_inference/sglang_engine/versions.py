"""Which releases of SGLang are supported. A later release than the tested ones is accepted: checksums prove each swap, and the
plugin checks its hooks at startup."""

from updraft_chassis.errors import InvalidInput

_INTRODUCED = {
    (0, 5, 15): "load plugins by entry point",
    (0, 5, 19): "report which version generated which token",
    (0, 5, 21): "update the weights of a draft alone",
    (0, 5, 23): "report that it is paused",
}
"""First release with each feature that Updraft needs."""

_TESTED = ((0, 5, 23),)
"""Releases that the contract tests run against."""


def is_tested(version: str) -> bool:
    """Whether a release ("0.5.23", "0.5.24.post1") is tested. Raises InvalidInput if it is too old or not a release."""
    parts = version.split(".")[:3]
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise InvalidInput(f"the server reports version {version!r}, which is not a release of SGLang")
    number = tuple(map(int, parts))
    missing = [feature for first, feature in _INTRODUCED.items() if number < first]
    if missing:
        oldest = ".".join(map(str, max(_INTRODUCED)))
        raise InvalidInput(f"SGLang {version} is too old, {oldest} is required: it cannot {', nor '.join(missing)}")
    return number in _TESTED
