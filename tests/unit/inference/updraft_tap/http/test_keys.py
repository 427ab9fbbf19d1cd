"""Keys of an engine's own port; the same as those of the embedded engine."""

import hashlib
import os
from contextlib import ExitStack
from pathlib import Path

import pytest
from starlette.datastructures import Headers

from updraft_chassis.errors import Exhausted, InvalidInput
from updraft_chassis.tenants import hashes
from updraft_inference.http import keys as embedded
from updraft_inference.http.errors import ApiError, api_error
from updraft_tap.http.holders import name_of_key
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


@pytest.mark.parametrize(
    ("line", "name", "words"),
    [
        (ONE, f"key-{hashlib.sha256(ONE.encode()).hexdigest()[:12]}", frozenset()),
        (f"acme {ONE}", "acme", frozenset()),
        (f"  acme.eu@west \t{ONE}  No-Train,on ", "acme.eu@west", frozenset({"no-train", "on"})),
    ],
)
def test_both_engines_read_the_same_tenant_and_words_of_a_key(
    tmp_path: Path, line: str, name: str, words: frozenset[str]
) -> None:
    path = tmp_path / "keys"
    path.write_text(f"{line}\n{OTHER}\n".replace(" No-Train,on ", " No-Train,on"))
    holder = Keys(path).holder(ONE)
    with embedded.Keys(path).admitted({"authorization": f"Bearer {ONE}"}) as client:
        assert (client.tenant, client.words) == (holder.tenant, holder.words) == (hashes.digest(name), words)


def test_both_engines_read_the_same_age_and_region_of_a_key(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    for words, age_s, region in (
        ("retain=30d,region=eu-west", 30 * 86_400, "eu-west"),
        ("no-train,Retain=12h,gateway", 12 * 3600, ""),
        ("on", 0, ""),
    ):
        path.write_text(f"acme {ONE} {words}\n")
        holder = Keys(path).holder(ONE)
        with embedded.Keys(path).admitted({"authorization": f"Bearer {ONE}"}) as client:
            assert (client.retention_s, client.region) == (holder.retention_s, holder.region) == (age_s, region)
        assert holder.is_gateway == ("gateway" in words)


@pytest.mark.parametrize(
    "words",
    ["retain=0d", "retain=30", "retain=90s", "retain=1d,retain=2d", "region=", "region=EU!", "region=a,region=b"],
)
def test_an_age_or_a_region_that_makes_no_sense_is_refused(tmp_path: Path, words: str) -> None:
    path = tmp_path / "keys"
    path.write_text(f"acme {ONE} {words}\n")
    with pytest.raises(KeysError, match=r"line 1 .* after its key"):
        Keys(path)


def test_keys_of_one_name_are_of_one_tenant_with_places_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"acme {ONE}\nacme {OTHER}\n")
    keys = Keys(path, max_at_once=1)
    assert keys.holder(ONE).tenant == keys.holder(OTHER).tenant
    with keys.admitted(ONE):
        assert refusal(keys, OTHER) is None


@pytest.mark.parametrize(
    ("line", "header", "tenant"),
    [
        (f"gate {ONE} gateway", "X-Team", "acme"),
        (f"gate {ONE} off,GATEWAY", "X-Team", "acme"),
        (f"gate {ONE} gateway", "", "gate"),
        (f"rival {ONE}", "X-Team", "rival"),
        (ONE, "X-Team", name_of_key(ONE)),
        (None, "X-Team", "acme"),
    ],
)
def test_a_header_names_the_tenant_of_the_embedded_engine_only_for_a_gateway(
    tmp_path: Path, line: str | None, header: str, tenant: str
) -> None:
    path = tmp_path / "keys"
    path.write_text(line or "")
    keys = embedded.Keys(path if line else None, tenant_header=header)
    with keys.admitted({"authorization": f"Bearer {ONE}", "x-team": "acme"}) as client:
        assert client.tenant == hashes.digest(tenant)


@pytest.mark.parametrize("values", [[b"acme", b"acme"], [b"a\x00"], ["é".encode("latin-1")]])
def test_the_embedded_engine_refuses_a_header_that_does_not_name_one_tenant(values: list[bytes]) -> None:
    keys = embedded.Keys(tenant_header="X-Team")
    with pytest.raises(InvalidInput, match=r"one header with the tenant|printable"):
        keys.admitted(Headers(raw=[(b"x-team", value) for value in values])).__enter__()
    with keys.admitted(Headers(raw=[(b"x-team", "voilà".encode())])) as client:
        assert client.tenant == hashes.digest("voilà")


def test_a_key_in_two_lines_is_refused_by_both_engines(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"acme {ONE}\nrival {OTHER}\nrival {ONE}\n")
    with pytest.raises(KeysError, match=r"line 3 .* is also in an earlier line"):
        Keys(path)
    with pytest.raises(InvalidInput, match=r"line 3 .* is also in an earlier line"):
        embedded.Keys(path)


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
        (f"{ONE}\ntwo words of a key\n".encode(), "line 2 .* is no token: expected KEY, NAME KEY"),
        (b"acme short\n", "line 1 .* has 5 characters"),
        (f"-acme {ONE}\n".encode(), "line 1 .* no valid name of a tenant"),
        (f"acme {OTHER} {ONE}\n".encode(), "line 1 .* unknown word after its key"),
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
