"""Keys of an engine's own port; the same as those of the embedded engine."""

import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from updraft_chassis.errors import Exhausted, InvalidInput
from updraft_inference.http import keys as embedded
from updraft_inference.http.errors import ApiError, api_error
from updraft_tap.http.keys import Keys, KeysError, RefusedRequestError

ONE, OTHER = "sk-one-0123456789", "sk-other-0123456789"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# of the team\n{ONE}\n\n  {OTHER}  \n")
    return path


def refusal(keys: Keys, key: str, num: int = 1) -> tuple[int, str, str | None] | None:
    """Why a request of that key is not let in."""
    try:
        with keys.admitted(key) as reserve:
            reserve(num)
    except RefusedRequestError as error:
        return error.status, error.message, error.code
    return None


def embedded_refusal(keys: embedded.Keys, key: str, num: int = 1) -> tuple[int, str, str | None] | None:
    """The same of the embedded engine."""
    try:
        with keys.admitted({"authorization": f"Bearer {key}"}) as client:
            client.reserve(num)
    except ApiError as error:
        return error.status, error.message, error.code
    except (Exhausted, InvalidInput) as error:
        answer = api_error(error)
        return answer.status, answer.message, answer.code
    return None


@pytest.mark.parametrize("key", [ONE, OTHER, "", ONE[:-1], f"{ONE}é", "# of the team"])
@pytest.mark.parametrize("num", [1, 2, 4])
@pytest.mark.parametrize("inside", [0, 1, 2, 3])
def test_a_request_is_let_in_or_refused_as_by_the_embedded_engine(file: Path, key: str, num: int, inside: int) -> None:
    keys, theirs = Keys(file, max_at_once=3), embedded.Keys(file, max_at_once=3)
    with ExitStack() as stack:
        for _ in range(inside):
            stack.enter_context(keys.admitted(ONE))
            stack.enter_context(theirs.admitted({"authorization": f"Bearer {ONE}"}))
        assert refusal(keys, key, num) == embedded_refusal(theirs, key, num)
    assert refusal(keys, ONE, 3) is None, "all places are free again"


def test_a_new_file_is_in_force_at_once_and_one_that_cannot_be_meant_is_not(file: Path) -> None:
    keys = Keys(file)
    file.write_text(f"{OTHER}\n")
    os.utime(file, ns=(1, 1))
    assert refusal(keys, ONE) is not None
    assert refusal(keys, OTHER) is None

    file.write_text("")
    os.utime(file, ns=(2, 2))
    assert refusal(keys, OTHER) is None
    file.unlink()
    assert refusal(keys, OTHER) is None


@pytest.mark.attack(
    boundary="plugin",
    attack="an API keys file that is damaged or has short keys",
    outcome="it is refused in a sentence that shows no key",
)
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"# nothing\n", "contains no key"),
        (b"short\n", "line 1 .* has 5 characters, expected 16"),
        (f"{ONE}\ntwo words of a key\n".encode(), "line 2 .* is no token"),
        ("sk-schlüssel-0123456789".encode(), "is not ASCII"),
        (b"#" * (1 << 21), "has more than 1048576 bytes"),
        (None, "cannot read the API keys file"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_without_telling_its_keys(
    tmp_path: Path, content: bytes | None, words: str
) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(KeysError, match=words) as caught:
        Keys(path)

    assert ONE not in str(caught.value)
    assert "short" not in str(caught.value)
