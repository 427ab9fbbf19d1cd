"""A person clicks, on a real local stack that serves real drafts; the registry and the engine do what was clicked."""

import asyncio
from collections.abc import Iterator

import pytest
from tests.browser.browser import Browser
from tests.browser.local import console
from tests.browser.pages import NAMES, Pages
from tests.support.processes import scrape
from tests.support.publishing import publish
from tests.support.registry import client, state
from tests.support.tiny_target import make_tiny_target
from tests.support.tiny_tokenizer import write_tokenizer
from tests.support.wait import wait_until

from updraft.registry.v1 import registry_pb2 as pb
from updraft_cli.local.plan import StackConfig
from updraft_cli.local.stack import Stack

pytestmark = [pytest.mark.timeout(600), pytest.mark.lasts(60)]

_SMALL = {
    "UPDRAFT_INFERENCE_MAX_CONTEXT": "512",
    "UPDRAFT_INFERENCE_DTYPE": "float32",
    "UPDRAFT_INFERENCE_POD_NAME": "pod-0",
}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """All processes of `updraft up` with a tiny model, and three drafts for it."""
    folder = tmp_path_factory.mktemp("stack")
    model = write_tokenizer(make_tiny_target(folder / "tiny"))
    config = StackConfig(
        model=model,
        data=folder / "data",
        port=0,
        registry_port=0,
        threads=1,
        trainer_threads=1,
        settings=_SMALL,
    )
    with Stack(config) as running:
        for seed in (1, 2, 3):
            asyncio.run(publish(model, running.addresses.registry, seed=seed))
        yield running


@pytest.fixture(scope="module")
def pages(stack: Stack) -> Iterator[Pages]:
    """The pages of `updraft ui` about that stack, as a process of its own."""
    with console(stack.folder.path) as address:
        yield Pages(address=address, name="default", version=3, pod="pod-0")


@pytest.mark.parametrize("page", NAMES)
def test_every_page_shows_a_real_stack_and_logs_no_error(browser: Browser, pages: Pages, page: str) -> None:
    browser.open(pages.address)
    browser.open(pages[page])
    assert browser.num("h1") == 1
    assert "That did not work" not in browser.text("main")


def test_a_version_is_promoted_rolled_back_and_pinned_by_click(browser: Browser, pages: Pages, stack: Stack) -> None:
    wait_until(lambda: served(stack) == 1, what="the engine serves the first version")
    browser.open(pages.address)
    browser.open(f"{pages.origin}/s/default/versions/3")
    browser.click("Promote this version")
    browser.click("Promote it")
    assert "Version 3 is promoted for default" in browser.text("main")
    assert now(stack).stable == 3
    wait_until(lambda: served(stack) == 3, what="the engine serves the promoted version")
    browser.click("Roll back to version 1")
    assert "All pods load version 1 now" in browser.text("main")
    browser.click("Pin it")
    assert now(stack).pinned == 1
    wait_until(lambda: served(stack) == 1, what="the engine serves version 1 again")
    browser.click("End the pin")
    browser.click("End the pin")
    assert not now(stack).HasField("pinned")
    wait_until(lambda: served(stack) == 3, what="the engine serves the promoted version")
    wait_until(lambda: "pinned" in browser.text("#live-history"), what="the pin in the history")


def test_a_reason_is_written_into_the_history(browser: Browser, pages: Pages, stack: Stack) -> None:
    browser.open(pages.address)
    browser.open(pages["history"])
    browser.click("Pause")
    browser.driver.find_element("id", "reason").send_keys("<b>lunch</b>")
    browser.click("Pause")
    assert now(stack).pause_reason == "<b>lunch</b>"
    wait_until(lambda: "<b>lunch</b>" in browser.text("#live-history"), what="the reason in the history")
    browser.click("Resume")
    browser.click("Resume")
    assert not now(stack).paused


def now(stack: Stack) -> pb.SpeculatorState:
    """What the registry has."""

    async def ask() -> pb.SpeculatorState:
        async with client(stack.addresses.registry) as stub:
            return await state(stub)

    return asyncio.run(ask())


def served(stack: Stack) -> int:
    """The version that the engine drafts with."""
    return int(scrape(stack.addresses.port).get("updraft_inference_draft_version", 0))
