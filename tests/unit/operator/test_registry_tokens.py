"""The operator's tokens for registries: one per audience, renewed in time."""

import pytest
from tests.support.clock import ManualClock

from updraft_chassis.errors import Forbidden, Unavailable
from updraft_operator.registry_tokens import TOKEN_S, RegistryTokens


class ApiServer:
    """Gives tokens that tell audience and number, unless it is away."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, int]] = []
        self.is_away = False

    async def token(self, audience: str, seconds: int) -> str:
        self.requests.append((audience, seconds))
        if self.is_away:
            raise Forbidden("no right to create serviceaccounts/token")
        return f"{audience}#{len(self.requests)}"


@pytest.fixture
def api() -> ApiServer:
    return ApiServer()


async def test_each_registry_gets_a_token_that_no_other_accepts(api: ApiServer) -> None:
    tokens = RegistryTokens(api.token, ManualClock())
    assert (await tokens.token("a")).value == "a#1"
    assert (await tokens.token("b")).value == "b#2"
    assert api.requests == [("a", TOKEN_S), ("b", TOKEN_S)]


async def test_a_token_is_renewed_when_a_fifth_of_its_life_is_left(api: ApiServer) -> None:
    clock = ManualClock()
    tokens = RegistryTokens(api.token, clock)
    first = await tokens.token("a")
    clock.advance(0.79 * TOKEN_S)
    assert await tokens.token("a") == first
    clock.advance(0.02 * TOKEN_S)
    assert (await tokens.token("a")).value == "a#2"


async def test_while_the_api_server_is_away_the_last_token_is_used_until_it_expires(api: ApiServer) -> None:
    clock = ManualClock()
    tokens = RegistryTokens(api.token, clock)
    first = await tokens.token("a")
    api.is_away = True
    clock.advance(0.95 * TOKEN_S)
    assert await tokens.token("a") == first
    clock.advance(0.1 * TOKEN_S)
    with pytest.raises(Unavailable, match="the operator gets no token for a from the API server: no right to create"):
        await tokens.token("a")


async def test_a_registry_that_is_gone_leaves_no_token(api: ApiServer) -> None:
    tokens = RegistryTokens(api.token, ManualClock())
    await tokens.token("a")
    tokens.forget("a")
    assert (await tokens.token("a")).value == "a#2"
