"""SGLang's own adaptive speculation under the adapter: nothing is drafted with a useless draft, and much with a good one."""

import json
from collections.abc import Iterator

import pytest
from tests.contract.engine_contract import asking, whole
from tests.sglang.attaching import Setting, attached, started
from tests.sglang.models import continuation
from torch import Tensor
from torch.testing import assert_close

from updraft_inference.engine import CaptureParams, FinishedRequest

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
    good, heard = setting.saved(1, 1.0), list[FinishedRequest]()
    options = CaptureParams(payload=True, prompt_rows=len(PROMPT))
    async with attached(setting, heard) as engine:
        for n in range(6):
            if n == 3:
                await engine.swap(good)
            request = asking(f"r{n}", max_tokens=len(EXPECTED), prompt_ids=PROMPT, capture=options)
            assert (await whole(engine, request))[0] == EXPECTED

        assert (engine.capture_problem, sum(engine.capture_losses.values())) == ("", 0)
    useless, useful = heard[:3], heard[3:]
    assert all(lengths(finished).count(0) >= len(EXPECTED) / 3 for finished in useless)
    assert set(lengths(useful[-1])) == {max(CANDIDATES)}
    assert all(finished.uncaptured is None for finished in heard), "all steps came, those without drafts too"
    for finished in heard:
        assert finished.hidden is not None
        assert finished.hidden.first_position == 0
        assert_close(finished.hidden.aux, hidden(useful[-1]), atol=1e-4, rtol=1e-4)


def lengths(finished: FinishedRequest) -> list[int]:
    """Drafts of each step."""
    return [len(step.draft_ids) for step in finished.steps]


def hidden(finished: FinishedRequest) -> Tensor:
    """Its auxiliary states."""
    assert finished.hidden is not None
    return finished.hidden.aux
