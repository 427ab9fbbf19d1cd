"""SGLang's own adaptive speculation beside an agent: nothing is drafted with a useless draft, and much with a good one."""

import json
from collections.abc import Iterator

import pytest
from tests.sglang.agent import beside, greedy, load
from tests.sglang.beside import Setting, started
from tests.sglang.models import continuation
from tests.support.tap_agent import Seen
from torch import Tensor
from torch.testing import assert_close

pytestmark = [pytest.mark.timeout(600), pytest.mark.lasts(120)]

CANDIDATES = [0, 1, 2]
PROMPT = tuple(b"hello")
EXPECTED = continuation("hello", 60)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    config = tmp_path_factory.mktemp("adaptive") / "steps.json"
    config.write_text(json.dumps({"1": {"candidate_steps": CANDIDATES}, "update_interval": 2, "warmup_batches": 2}))
    with started("--speculative-adaptive", "--speculative-adaptive-config", str(config)) as setting:
        yield setting


async def test_the_server_stops_drafting_with_a_useless_draft_and_goes_on_when_a_good_one_is_swapped_in(
    setting: Setting,
) -> None:
    good, num_tokens = setting.saved(1, 1.0), len(EXPECTED)
    async with beside(setting.socket) as agent:
        for number in range(6):
            if number == 3:
                assert (await load(agent, good.folder, good.version))["refusal"] == ""
            assert await greedy(setting.server, PROMPT, num_tokens) == EXPECTED
            await agent.settle()
        assert agent.dropped == 0
        seen = list(agent.seen.values())
    useless, useful = seen[:3], seen[3:]
    assert all(lengths(one).count(0) >= num_tokens / 3 for one in useless)
    assert set(lengths(useful[-1])) == {max(CANDIDATES)}
    expected = rows(useful[-1])
    for one in seen:
        found = rows(one)
        assert found.keys() >= set(range(len(PROMPT) + num_tokens - 1)), "all rows came, those without drafts too"
        for position in range(len(PROMPT) + num_tokens - 1):
            assert_close(found[position], expected[position], atol=1e-4, rtol=1e-4)


def lengths(seen: Seen) -> list[int]:
    """Drafts of each step."""
    return [len(step["drafts"]) for step in seen.steps]


def rows(seen: Seen) -> dict[int, Tensor]:
    """Its auxiliary states by position."""
    return dict(seen.rows)
