import os
from pathlib import Path

import pytest

from updraft_chassis.errors import Exhausted, InvalidInput
from updraft_inference.http.errors import ApiError
from updraft_inference.http.keys import Keys

ONE, OTHER = "sk-one-0123456789", "sk-other-0123456789"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# of the team\n{ONE}\n\n  {OTHER}  \n")
    return path


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize("key", [ONE, OTHER])
def test_every_key_of_the_file_lets_in(file: Path, key: str) -> None:
    with Keys(file).admitted(bearer(key)):
        pass


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({}, "didn't provide"),
        ({"authorization": ONE}, "didn't provide"),
        ({"authorization": f"Basic {ONE}"}, "didn't provide"),
        (bearer(""), "didn't provide"),
        (bearer(ONE[:-1]), "Incorrect"),
        (bearer(f"{ONE}é"), "Incorrect"),
        (bearer("# of the team"), "Incorrect"),
    ],
)
def test_nothing_else_does(file: Path, headers: dict[str, str], words: str) -> None:
    with pytest.raises(ApiError, match=words) as caught, Keys(file).admitted(headers):
        pass

    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
    assert caught.value.headers == {"WWW-Authenticate": "Bearer"}


def test_without_a_file_everybody_is_let_in() -> None:
    with Keys().admitted({}):
        pass


def test_a_key_has_so_many_places_and_another_key_its_own(file: Path) -> None:
    keys = Keys(file, max_at_once=2)
    with keys.admitted(bearer(ONE)), keys.admitted(bearer(ONE)):
        with pytest.raises(Exhausted, match="already has 2 of at most 2"), keys.admitted(bearer(ONE)):
            pass
        with keys.admitted(bearer(OTHER)):
            pass
    with keys.admitted(bearer(ONE)):
        pass


def test_each_choice_takes_a_place(file: Path) -> None:
    keys = Keys(file, max_at_once=4)
    with keys.admitted(bearer(ONE)) as client:
        client.reserve(3)
        with keys.admitted(bearer(ONE)) as other:
            with pytest.raises(Exhausted, match=r"already has 3 of at most 4"):
                other.reserve(2)
            with pytest.raises(InvalidInput, match="n is 5, but an API key may have at most 4 concurrent"):
                other.reserve(5)
    with keys.admitted(bearer(ONE)) as client:
        client.reserve(4)


def test_all_requests_of_a_key_are_of_one_client_that_does_not_tell_the_key(file: Path) -> None:
    keys = Keys(file)
    with keys.admitted(bearer(ONE)) as one, keys.admitted(bearer(ONE)) as again, keys.admitted(bearer(OTHER)) as other:
        assert one.id == again.id != other.id
        assert ONE not in one.id
    with Keys().admitted({}) as anybody:
        assert anybody.id == ""


def test_a_new_file_is_in_force_at_once(file: Path) -> None:
    keys = Keys(file)
    file.write_text(f"{OTHER}\n")
    os.utime(file, ns=(1, 1))

    with pytest.raises(ApiError), keys.admitted(bearer(ONE)):
        pass
    with keys.admitted(bearer(OTHER)):
        pass


@pytest.mark.attack(
    boundary="client",
    attack="an API keys file that is damaged or has short keys",
    outcome="it is refused in a sentence that shows no key",
)
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("# nothing\n", "contains no key"),
        ("short\n", "line 1 .* has 5 characters, expected 16"),
        (f"{ONE}\ntwo words of a key\n", "line 2 .* is no token"),
        (f"acme {ONE} {OTHER}\n", "line 1 .* unknown word after its key"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_without_telling_its_keys(
    tmp_path: Path, content: str, words: str
) -> None:
    path = tmp_path / "keys"
    path.write_text(content)

    with pytest.raises(InvalidInput, match=words) as caught:
        Keys(path)

    assert ONE not in str(caught.value)
    assert "short" not in str(caught.value)
