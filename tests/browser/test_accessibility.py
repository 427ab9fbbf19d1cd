"""Every page can be used without a mouse, without scripts and on a phone, and axe finds nothing serious on it."""

import pytest
from tests.browser.browser import PHONE, Browser, Theme
from tests.browser.pages import DRAWN, NAMES, Pages
from tests.support.console import MemoryBackend

_FOCUSABLE = "a[href], button:not([hidden]), summary, input:not([type=hidden]), select, [tabindex='0']"
_PLACE = "return [...document.querySelectorAll('*')].indexOf(document.activeElement)"

each_page = pytest.mark.parametrize("page", NAMES)


@each_page
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser: Browser, pages: Pages, page: str, theme: Theme) -> None:
    browser.show(theme)
    browser.open(pages.address)
    browser.open(pages[page])
    browser.wait_for(DRAWN, what="all charts")
    assert browser.findings() == []


@each_page
def test_a_page_fits_a_phone_and_axe_finds_nothing_serious_there(browser: Browser, pages: Pages, page: str) -> None:
    browser.show("light", PHONE)
    browser.open(pages.address)
    browser.open(pages[page])
    browser.wait_for(DRAWN, what="all charts")
    assert browser.run("return document.documentElement.scrollWidth") <= PHONE[0]
    assert browser.findings() == []


@pytest.mark.parametrize(("page", "column"), [("history", "became"), ("version", "became"), ("diff", "version {}")])
def test_a_phone_shows_what_a_version_became_and_both_sides_of_a_difference(
    browser: Browser, pages: Pages, page: str, column: str
) -> None:
    browser.show("light", PHONE)
    browser.open(pages.address)
    browser.open(pages[page])
    right = browser.run(
        "return [...document.querySelectorAll('th')].find(one => one.textContent.trim() === arguments[0])"
        ".getBoundingClientRect().right",
        column.format(pages.version),
    )
    assert 0 < right <= PHONE[0]


@each_page
def test_a_page_can_be_read_without_scripts(browser: Browser, pages: Pages, page: str) -> None:
    with browser.without_scripts():
        browser.open(pages.address)
        browser.open(pages[page])
        assert browser.num("h1") == 1
        assert len(browser.text("main")) > 100
        assert browser.num("figure[data-chart]") == browser.num("figure[data-chart] details")
        assert not browser.run("return document.getElementById('theme').checkVisibility()")


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
