"""Every page in a real Chromium, on a fleet in memory: what a person reads, with and without scripts, keyboard and mouse."""

from dataclasses import replace

import pytest
from tests.browser.browser import FIRST_LOAD_BYTES, PHONE, Browser, Theme
from tests.browser.pages import NAMES, Pages, pages_of
from tests.support.console import MemoryBackend, memory_backend, state

from updraft_cli.backends.drafts import DomainAcceptance
from updraft_cli.backends.snapshot import Snapshot
from updraft_cli.ui.server import serving

HOSTILE = "<script>document.title='owned'</script>"
HOSTILE_POD = "<script>document.title='owned'"
"""As a part of an address, it has no slash."""

_FOCUSABLE = "a[href], button:not([hidden]), summary, input:not([type=hidden]), select, [tabindex='0']"
_PLACE = "return [...document.querySelectorAll('*')].indexOf(document.activeElement)"
_DRAWN = "[...document.querySelectorAll('.chart-plot')].every(place => place.hasChildNodes())"

each_page = pytest.mark.parametrize("page", NAMES)


@each_page
def test_a_page_has_one_heading_draws_its_charts_and_logs_no_error(browser: Browser, pages: Pages, page: str) -> None:
    browser.open(pages.address)
    browser.open(pages[page])
    assert browser.num("h1") == 1
    browser.wait_for(_DRAWN, what="all charts")


@each_page
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser: Browser, pages: Pages, page: str, theme: Theme) -> None:
    browser.show(theme)
    browser.open(pages.address)
    browser.open(pages[page])
    browser.wait_for(_DRAWN, what="all charts")
    assert browser.findings() == []


@each_page
def test_a_page_fits_a_phone_and_axe_finds_nothing_serious_there(browser: Browser, pages: Pages, page: str) -> None:
    browser.show("light", PHONE)
    browser.open(pages.address)
    browser.open(pages[page])
    browser.wait_for(_DRAWN, what="all charts")
    assert browser.run("return document.documentElement.scrollWidth") <= PHONE[0]
    assert browser.findings() == []


@each_page
def test_a_page_can_be_read_without_scripts(browser: Browser, pages: Pages, page: str) -> None:
    with browser.without_scripts():
        browser.open(pages.address)
        browser.open(pages[page])
        assert browser.num("h1") == 1
        assert len(browser.text("main")) > 100
        assert browser.num("figure[data-chart]") == browser.num("figure[data-chart] details")
        assert not browser.run("return document.getElementById('theme').checkVisibility()")


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
            browser.wait_for(_DRAWN, what="all charts")
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


def test_everything_can_be_reached_with_the_keyboard_and_the_focus_is_seen(browser: Browser, pages: Pages) -> None:
    browser.open(pages.address)
    browser.open(pages["rollout"])
    browser.wait_for("!document.getElementById('theme').hidden", what="the page is complete")
    num_places = browser.run(
        f"return [...document.querySelectorAll(`{_FOCUSABLE}`)].filter(at => at.checkVisibility()).length"
    )
    reached = set()
    for _ in range(num_places):
        browser.press("TAB")
        reached.add(browser.run(_PLACE))
        assert browser.run("return getComputedStyle(document.activeElement).outlineStyle") != "none", browser.focused()
    assert len(reached) == num_places


def test_the_first_key_skips_the_menu(browser: Browser, pages: Pages) -> None:
    browser.open(pages.address)
    browser.press("TAB")
    assert browser.focused() == "Skip to the content"
    browser.press("ENTER", "TAB")
    assert browser.run("return document.getElementById('main').contains(document.activeElement)")


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


def test_a_decision_is_made_with_the_keyboard_alone(browser: Browser, backend: MemoryBackend, pages: Pages) -> None:
    browser.open(pages.address)
    browser.open(pages["version"])
    for words in ("Pin this version", "Pin it"):
        while browser.focused() != words:
            browser.press("TAB")
        browser.press("ENTER")
        browser.wait_for("arguments[0] !== document.activeElement.textContent.trim()", words, what="the next page")
    assert browser.path().endswith("/history")
    assert [decision[:3] for decision in backend.memory.decisions] == [(pages.name, "pin", pages.version)]


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
