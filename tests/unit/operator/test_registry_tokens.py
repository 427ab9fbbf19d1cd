"""The operator's token for a registry, renewed in time."""

import asyncio

import pytest
from tests.support.clock import ManualClock
from tests.unit.operator.virtual_time import LoopClock, run

from updraft_chassis.errors import Forbidden, Unavailable
from updraft_operator.registry_tokens import MOST_REQUESTS, REQUEST_S, TOKEN_S, FewRequests, RegistryToken


class ApiServer:
    """Gives tokens that tell audience and number, unless it is away."""

    def __init__(self, most_s: int = TOKEN_S) -> None:
        self.requests: list[tuple[str, int]] = []
        self.is_away = False
        self._most_s = most_s

    async def token(self, audience: str, seconds: int) -> tuple[str, int]:
        self.requests.append((audience, seconds))
        await asyncio.sleep(0)
        if self.is_away:
            raise Forbidden("no right to create serviceaccounts/token")
        return f"{audience}#{len(self.requests)}", min(seconds, self._most_s)


@pytest.fixture
def api() -> ApiServer:
    return ApiServer()


@pytest.mark.attack(
    boundary="tenants",
    attack="the operator's token of one registry at another",
    outcome="it is for another audience",
)
async def test_each_registry_gets_a_token_that_no_other_accepts(api: ApiServer) -> None:
    clock = ManualClock()
    first, second = (RegistryToken(api.token, audience, clock) for audience in ("a", "b"))
    assert (await first.get()).value == "a#1"
    assert (await second.get()).value == "b#2"
    assert api.requests == [("a", TOKEN_S), ("b", TOKEN_S)]


@pytest.mark.parametrize(
    "most_s", [pytest.param(TOKEN_S, id="of the usual length"), pytest.param(600, id="that the cluster limits")]
)
async def test_a_token_is_renewed_when_a_fifth_of_its_life_is_left(most_s: int) -> None:
    api, clock = ApiServer(most_s), ManualClock()
    token = RegistryToken(api.token, "a", clock)
    first = await token.get()
    clock.advance(0.79 * most_s)
    assert await token.get() == first
    clock.advance(0.02 * most_s)
    assert (await token.get()).value == "a#2"


async def test_those_who_need_a_new_token_at_once_share_one(api: ApiServer) -> None:
    token = RegistryToken(api.token, "a", ManualClock())
    first, second = await asyncio.gather(token.get(), token.get())
    assert first == second
    assert len(api.requests) == 1


async def test_while_the_api_server_is_away_the_last_token_is_used_until_it_expires(api: ApiServer) -> None:
    clock = ManualClock()
    token = RegistryToken(api.token, "a", clock)
    first = await token.get()
    api.is_away = True
    clock.advance(0.95 * TOKEN_S)
    assert await token.get() == first
    clock.advance(0.1 * TOKEN_S)
    with pytest.raises(Unavailable, match="the operator gets no token for a from the API server: no right to create"):
        await token.get()


class SlowServer:
    """Answers after a second, or never."""

    def __init__(self) -> None:
        self.num_asked = self.most_asked = 0
        self.hangs = False

    async def token(self, audience: str, seconds: int) -> tuple[str, int]:
        self.num_asked += 1
        self.most_asked = max(self.most_asked, self.num_asked)
        try:
            await asyncio.sleep(10 * TOKEN_S if self.hangs else 1.0)
        finally:
            self.num_asked -= 1
        return audience, seconds


def test_many_tokens_are_asked_for_a_few_at_a_time_and_an_answer_that_never_comes_holds_up_none() -> None:
    async def main() -> None:
        server = SlowServer()
        few = FewRequests(server.token)
        tokens = [RegistryToken(few, str(number), LoopClock()) for number in range(10 * MOST_REQUESTS)]
        known = await asyncio.gather(*(token.get() for token in tokens))
        assert [each.value for each in known] == [str(number) for number in range(len(tokens))]
        assert server.most_asked == MOST_REQUESTS

        server.hangs = True
        await asyncio.sleep(0.9 * TOKEN_S)
        began_s = LoopClock().monotonic()
        assert await asyncio.gather(*(token.get() for token in tokens)) == known
        assert LoopClock().monotonic() - began_s <= REQUEST_S

        await asyncio.sleep(known[0].expires_s - LoopClock().monotonic() - REQUEST_S / 2)
        with pytest.raises(Unavailable, match="no answer within 20 s"):  # it has expired meanwhile
            await tokens[0].get()

    run(main())
