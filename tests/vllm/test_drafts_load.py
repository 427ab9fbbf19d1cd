"""Stock vLLM serves what `updraft draft pull` leaves in a folder: as it is, changing no token, accepting what was taught.

One story with two servers, one after the other, and then what it showed.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner
from tests.support.registry import RegistryProcess
from tests.vllm import build, drafts, swapping
from tests.vllm.server import Drafted, Server, serving

from updraft_cli.__main__ import cli
from updraft_cli.local.folders import cache_folder
from updraft_cli.models.smollm2 import model_folder
from updraft_draft import checkpoint

if not build.is_built():
    pytest.skip("stock vLLM is not installed; run `make vllm-build`", allow_module_level=True)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

NUM_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """The answers to all prompts, and what speculation did for them."""

    answers: list[list[int]]
    drafted: Drafted


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """What happened."""

    picks: list[list[int]]
    """What transformers would have said."""
    untrained: Round
    swapped: Round
    """The same server, after a swap to the published draft."""
    published: Round
    """Another server, started with the published draft."""
    target_before: dict[str, str]
    target_after: dict[str, str]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder, model = tmp_path_factory.mktemp("vllm"), model_folder(cache_folder(os.environ))
    prompts = drafts.prompts(model)
    learner = drafts.new_learner(model, prompts)
    checkpoint.save(learner.network, folder / "untrained")
    variables = swapping.install_plugin(folder / "plugin")
    with serving(
        model, folder / "untrained", folder / "first", options=swapping.OPTIONS, variables=variables
    ) as server:
        untrained = _ask(server, prompts)
        answers = drafts.read_answers(model, zip(prompts, untrained.answers, strict=True))
        for _ in range(drafts.NUM_STEPS):
            learner.train([answer.sample for answer in answers])
        checkpoint.save(learner.network, folder / "trained")
        pulled = _publish_and_pull(folder / "trained", model, folder)
        target_before = swapping.target_checksums(server)
        swapping.swap(server, pulled, version="1")
        target_after = swapping.target_checksums(server)
        swapped = _ask(server, prompts)
    with serving(model, pulled, folder / "second") as server:
        published = _ask(server, prompts)
    return Story(
        picks=[answer.picks for answer in answers],
        untrained=untrained,
        swapped=swapped,
        published=published,
        target_before=target_before,
        target_after=target_after,
    )


def test_a_published_draft_changes_no_greedy_token(story: Story) -> None:
    assert story.published.answers == story.picks
    assert story.untrained.answers == story.picks


def test_what_the_trainer_taught_is_accepted(story: Story) -> None:
    assert story.published.drafted.accepted > 0
    assert story.published.drafted.acceptance_length > story.untrained.drafted.acceptance_length + 1


def test_a_swap_by_the_stock_endpoints_serves_the_same_draft_and_leaves_the_target_alone(story: Story) -> None:
    assert story.swapped.answers == story.picks
    assert story.swapped.drafted == story.published.drafted
    assert story.target_after == story.target_before != {}


def _ask(server: Server, prompts: Sequence[Sequence[int]]) -> Round:
    before = server.drafted()
    answers = [server.greedy(prompt, NUM_TOKENS) for prompt in prompts]
    return Round(answers=answers, drafted=server.drafted().since(before))


def _publish_and_pull(draft: Path, model: Path, folder: Path) -> Path:
    """The folder that the command line leaves after a draft went through a registry."""
    registry_folder = folder / "registry"
    registry_folder.mkdir()
    with RegistryProcess(registry_folder) as registry:
        _updraft("draft", "import", draft, "--target", model, "--registry", registry.address)
        return Path(_updraft("draft", "pull", "1", folder / "drafts", "--registry", registry.address).strip())


def _updraft(*arguments: object) -> str:
    elsewhere = {name: None for name in os.environ if name.startswith("UPDRAFT_")}
    result = CliRunner(env=elsewhere).invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output
