"""SGLang's draft length beside an agent: none with the initial draft, then what its own adaptive speculation chooses.

A few steps with drafts show what a first version is worth, before it is used.
"""

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


async def test_the_server_drafts_nothing_at_first_and_later_shows_what_drafts_are_worth(setting: Setting) -> None:
    poor, good, num_tokens = setting.saved(1, 0.0), setting.saved(2, 1.0), len(EXPECTED)
    async with beside(setting.socket) as agent:
        for draft in (None, None, poor, None, good, *[None] * 30):
            if draft is not None:
                assert (await load(agent, draft.folder, draft.version))["refusal"] == ""
            assert await greedy(setting.server, PROMPT, num_tokens) == EXPECTED
            await agent.settle()
            if any(message["loads"] for message in agent.speedups):
                break
        assert agent.dropped == 0
        seen, ends = list(agent.seen.values()), [header for header, _ in agent.finished.values()]
    first, useless, useful = seen[:2], seen[2:4], seen[4:]
    assert all(set(lengths(one)) == {0} for one in first)
    assert [end["counters"] for end in ends[:2]] == [[], []], "a step without drafts is no verify step"
    assert all(lengths(one).count(0) >= num_tokens / 3 for one in useless)
    assert any(max(CANDIDATES) in lengths(one) for one in useful)
    assert {message["version"] for message in agent.speedups} == {1, 2}
    assert all(0 < low <= ratio <= high for _, ratio, low, high in agent.speedups[-1]["loads"])
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
