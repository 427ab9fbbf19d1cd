"""The cluster's keys: which are used, when they are read again, and what happens while they cannot be."""

import asyncio
import json

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from tests.support.clock import ManualClock
from tests.support.service_accounts import SigningKey, key_set

from updraft_chassis.errors import InvalidInput, Unauthenticated, Unavailable
from updraft_registry.identity.keys import MIN_INTERVAL_S, KeySet, parse

FIRST, SECOND = SigningKey("first"), SigningKey("second", curve=ec.SECP256R1())


class Source:
    """What an API server publishes; `is_away` while it does not answer."""

    def __init__(self, *keys: SigningKey) -> None:
        self.keys = keys
        self.is_away = False
        self.num_fetches = 0

    async def fetch(self) -> bytes:
        self.num_fetches += 1
        await asyncio.sleep(0)
        if self.is_away:
            raise Unavailable("https://kubernetes.default.svc does not answer")
        return key_set(*self.keys)


async def test_a_key_that_is_known_is_not_fetched_again() -> None:
    source, clock = Source(FIRST), ManualClock()
    keys = KeySet(source.fetch, clock)
    for _ in range(3):
        await keys.key("first")
        clock.advance(1000)
    assert source.num_fetches == 1


async def test_a_new_key_is_fetched_at_once() -> None:
    source, clock = Source(FIRST), ManualClock()
    keys = KeySet(source.fetch, clock)
    await keys.key("first")
    source.keys = (FIRST, SECOND)
    clock.advance(MIN_INTERVAL_S)
    assert (await keys.key("second")).algorithm_name == "ES256"
    assert (await keys.key("first")).algorithm_name == "RS256"


async def test_a_key_that_the_cluster_withdrew_is_gone_after_the_next_fetch() -> None:
    source, clock = Source(FIRST), ManualClock()
    keys = KeySet(source.fetch, clock)
    await keys.key("first")
    source.keys = (SECOND,)
    clock.advance(MIN_INTERVAL_S)
    await keys.key("second")
    with pytest.raises(Unauthenticated, match="'first', which is not one of the cluster's"):
        await keys.key("first")


@pytest.mark.attack(
    boundary="registry",
    attack="thousands of tokens with invented key IDs",
    outcome="one request to the API server per interval",
)
async def test_a_storm_of_invented_key_ids_costs_one_fetch_per_interval() -> None:
    source, clock = Source(FIRST), ManualClock()
    keys = KeySet(source.fetch, clock)

    async def invented(number: int) -> None:
        with pytest.raises(Unauthenticated, match="not one of the cluster's"):
            await keys.key(f"invented-{number}")

    for storm in range(3):
        await asyncio.gather(*(invented(number) for number in range(500)))
        assert source.num_fetches == storm + 1
        await keys.key("first")
        clock.advance(MIN_INTERVAL_S)


async def test_while_the_api_server_is_away_known_keys_stay_valid_and_others_are_refused() -> None:
    source, clock, results = Source(FIRST), ManualClock(), list[bool]()
    keys = KeySet(source.fetch, clock, results.append)
    await keys.key("first")
    source.is_away = True
    clock.advance(3600)

    with pytest.raises(Unavailable, match=r"'second', which is not known yet, .* cannot be read: .*not answer"):
        await keys.key("second")
    await keys.key("first")

    source.is_away, source.keys = False, (FIRST, SECOND)
    clock.advance(MIN_INTERVAL_S)
    await keys.key("second")
    assert results == [True, False, True]


@pytest.mark.attack(
    boundary="registry",
    attack="a key ID with control characters",
    outcome="errors show a short printable part",
)
async def test_a_long_invented_key_id_is_shown_in_part() -> None:
    keys = KeySet(Source(FIRST).fetch, ManualClock())
    with pytest.raises(Unauthenticated) as refused:
        await keys.key("\x1b[31m" + "x" * 5000)
    assert len(str(refused.value)) < 250
    assert "\x1b" not in str(refused.value)


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(SigningKey("k", bits=1024).public, id="short RSA key"),
        pytest.param(SigningKey("k", curve=ec.SECP384R1()).public, id="another curve"),
        pytest.param({"kty": "oct", "k": "c2VjcmV0LXNlY3JldC1zZWNyZXQ", "kid": "k"}, id="symmetric key"),
        pytest.param({**FIRST.public, "use": "enc"}, id="key for encryption"),
        pytest.param({**FIRST.public, "alg": "RS512"}, id="key of another algorithm"),
        pytest.param({**FIRST.public, "kid": ""}, id="key without an ID"),
        pytest.param({**FIRST.public, "n": "?"}, id="broken key"),
        pytest.param({"kty": "RSA", "kid": "k"}, id="no key"),
    ],
)
def test_keys_that_no_token_may_be_signed_with_are_left_out(key: dict[str, str]) -> None:
    assert parse(json.dumps({"keys": [key, SECOND.public]}).encode()).keys() == {"second"}
    with pytest.raises(InvalidInput, match="no RSA or P-256 key"):
        parse(json.dumps({"keys": [key]}).encode())


@pytest.mark.parametrize("content", [b"", b"<html>", b"[]", b"{}", b'{"keys": 3}', b"[" * 100_000, b"\xff\xfe"])
def test_what_is_no_key_set_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidInput):
        parse(content)
