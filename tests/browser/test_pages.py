"""Every page in a real Chromium, on a fleet in memory: what a person reads, and what nobody may read or do."""

from dataclasses import replace

import pytest
from tests.browser.browser import FIRST_LOAD_BYTES, Browser
from tests.browser.pages import DRAWN, NAMES, Pages, pages_of
from tests.support.console import MemoryBackend, memory_backend, state

from updraft_cli.backends.drafts import DomainAcceptance
from updraft_cli.backends.snapshot import Snapshot
from updraft_cli.ui.server import serving

HOSTILE = "<script>document.title='owned'</script>"
HOSTILE_POD = "<script>document.title='owned'"
"""As a part of an address, it has no slash."""

each_page = pytest.mark.parametrize("page", NAMES)


@each_page
def test_a_page_has_one_heading_draws_its_charts_and_logs_no_error(browser: Browser, pages: Pages, page: str) -> None:
    browser.open(pages.address)
    browser.open(pages[page])
    assert browser.num("h1") == 1
    browser.wait_for(DRAWN, what="all charts")


def test_the_token_leaves_the_address(browser: Browser, pages: Pages) -> None:
    browser.open(pages.address)
    assert browser.path() == "/"


def test_without_the_token_nothing_is_shown(browser: Browser, pages: Pages) -> None:
    browser.open(pages["fleet"])
    assert "qwen" not in browser.run("return document.documentElement.outerHTML")
    assert browser.console() != []  # Chromium logs the refusal


def test_the_first_load_is_small(browser: Browser, pages: Pages) -> None:
    browser.open(pages.address)
    browser.wait_for("document.querySelector('canvas')", what="a chart")
    assert 0 < browser.transferred() <= FIRST_LOAD_BYTES


def test_names_that_look_like_markup_are_shown_as_text(browser: Browser) -> None:
    backend = memory_backend(hostile())
    with serving(backend) as console:
        pages, texts = pages_of(console.address, backend.memory.snapshot), dict[str, str]()
        browser.open(pages.address)
        for page in NAMES:
            browser.open(pages[page])
            browser.wait_for(DRAWN, what="all charts")
            texts[page] = browser.text("body")
            assert browser.run("return document.title") != "owned", page
            assert browser.num("main script") == 0, page
        browser.leave()
    for page in ("overview", "rollout", "learning", "traffic", "history"):
        assert HOSTILE in texts[page], page
    assert HOSTILE_POD in texts["pod"]


def test_the_theme_can_be_chosen_and_stays(browser: Browser, pages: Pages) -> None:
    background = "return getComputedStyle(document.body).backgroundColor"
    browser.show("dark")
    browser.open(pages.address)
    dark = browser.run(background)
    browser.wait_for("document.getElementById('theme').checkVisibility()", what="the button")
    browser.driver.find_element("id", "theme").click()
    light = browser.run(background)
    assert light != dark
    browser.open(pages["history"])
    assert browser.run(background) == light
    browser.wait_for("document.getElementById('theme').textContent === 'Dark theme'", what="the way back")


def test_a_decision_that_a_person_may_not_take_is_disabled_and_says_why(
    browser: Browser, backend: MemoryBackend, pages: Pages
) -> None:
    backend.memory.refusal = "you may not patch adaptivespeculators in namespace prod"
    browser.open(pages.address)
    browser.open(pages["rollout"])
    assert browser.num(".actions a") == 0
    assert browser.num(".actions [aria-disabled=true]") > 2
    assert backend.memory.refusal in browser.text(".actions")
    browser.open(pages["confirm"])
    assert browser.num("form button:disabled") == 1


def hostile() -> Snapshot:
    """A state in which whatever others name is markup."""
    snapshot = state(num_pods=3, num_versions=6)
    (one,) = snapshot.speculators
    speculator = replace(
        one.speculator,
        message=HOSTILE,
        trainer_message=HOSTILE,
        pause_reason=HOSTILE,
        paused=True,
        domains=(DomainAcceptance(domain=HOSTILE, stable=2.0, candidate=2.1),),
    )
    one = replace(
        one,
        speculator=speculator,
        drafts=tuple(replace(draft, reason=HOSTILE) for draft in one.drafts),
        history=tuple(replace(entry, reason=HOSTILE, actor=HOSTILE) for entry in one.history),
        pods=tuple(replace(pod, name=f"{HOSTILE_POD}{i}", problem=HOSTILE) for i, pod in enumerate(one.pods)),
    )
    return replace(snapshot, speculators=(one,))
