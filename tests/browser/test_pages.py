"""Every page in a real Chromium, on a fleet in memory: what a person reads, with and without scripts, keyboard and mouse."""

from dataclasses import replace
from datetime import timedelta

import pytest
from tests.browser.browser import PHONE, Browser, Theme
from tests.browser.pages import NAMES, Pages
from tests.support.console import MemoryBackend, state

from updraft_cli.backends.snapshot import Snapshot

HOSTILE = "<script>document.title='owned'</script>"
FIRST_LOAD_BYTES = 400_000

each_page = pytest.mark.parametrize("page", NAMES)


@each_page
def test_a_page_has_one_heading_and_logs_no_error(browser: Browser, pages: Pages, page: str) -> None:
    browser.open(pages.address)
    browser.open(pages[page])
    assert browser.num("h1") == 1
    assert browser.run("return document.title") != ""
    assert browser.num("figure[data-chart]") == browser.wait_for(
        "[...document.querySelectorAll('figure[data-chart]')].filter(figure => figure.querySelector('canvas, .chart-plot p')).length"
        " || document.querySelectorAll('figure[data-chart]').length === 0 && '0'",
    ) or browser.num("figure[data-chart]") == 0


@each_page
@pytest.mark.parametrize(("theme", "size"), [("light", None), ("dark", None), ("light", PHONE)])
def test_axe_finds_nothing_serious(
    browser: Browser, pages: Pages, page: str, theme: Theme, size: tuple[int, int] | None
) -> None:
    browser.show(theme, *filter(None, [size]))
    browser.open(pages.address)
    browser.open(pages[page])
    assert browser.findings() == []


@each_page
def test_a_page_fits_the_width_of_a_phone(browser: Browser, pages: Pages, page: str) -> None:
    browser.show("light", PHONE)
    browser.open(pages.address)
    browser.open(pages[page])
    assert browser.run("return document.documentElement.scrollWidth") <= PHONE[0]


@each_page
def test_a_page_can_be_read_without_scripts(browser: Browser, pages: Pages, page: str) -> None:
    with browser.without_scripts():
        browser.open(pages.address)
        browser.open(pages[page])
        assert browser.num("h1") == 1
        assert len(browser.text("main")) > 100
        assert browser.num("figure[data-chart]") == browser.num("figure[data-chart] details table")


def test_the_token_leaves_the_address(browser: Browser, pages: Pages) -> None:
    browser.open(pages.address)
    assert browser.path() == "/"


def test_without_the_token_nothing_is_shown(browser: Browser, pages: Pages) -> None:
    browser.open(pages["fleet"])
    assert pages.pod not in browser.run("return document.documentElement.outerHTML")
    assert browser.console() != []  # Chromium logs the refusal


def test_the_first_load_is_small(browser: Browser, pages: Pages) -> None:
    browser.open(pages.address)
    browser.wait_for("document.querySelector('canvas')", what="a chart")
    script = "return performance.getEntries().reduce((sum, entry) => sum + (entry.transferSize ?? 0), 0)"
    assert 0 < browser.run(script) <= FIRST_LOAD_BYTES


def test_names_that_look_like_markup_are_shown_as_text(browser: Browser, hostile: Pages) -> None:
    shown = ""
    browser.open(hostile.address)
    for page in NAMES:
        browser.open(hostile[page])
        shown += browser.text("body")
        assert browser.run("return document.title") != "owned", page
        assert browser.num("main script") == 0, page
    assert HOSTILE in shown


def test_the_theme_can_be_chosen_and_stays(browser: Browser, pages: Pages) -> None:
    browser.show("dark")
    browser.open(pages.address)
    dark = browser.run("return getComputedStyle(document.body).backgroundColor")
    browser.driver.find_element("id", "theme").click()
    light = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert light != dark
    browser.open(pages["history"])
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == light
    assert browser.text("#theme") == "Dark theme"


def test_everything_can_be_reached_with_the_keyboard_and_the_focus_is_seen(browser: Browser, pages: Pages) -> None:
    browser.open(pages.address)
    browser.open(pages["rollout"])
    num_places = browser.num("a[href], button:not([hidden]), summary, input:not([type=hidden]), select, [tabindex='0']")
    browser.press("TAB")
    assert "skip" in browser.run("return document.activeElement.className")
    reached = set()
    for _ in range(num_places):
        reached.add(browser.run(_PLACE))
        outline = browser.run("return getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", browser.focused()
        browser.press("TAB")
    assert len(reached) >= num_places - 1


_PLACE = "return [...document.querySelectorAll('*')].indexOf(document.activeElement)"


def test_the_first_key_skips_the_menu(browser: Browser, pages: Pages) -> None:
    browser.open(pages.address)
    browser.press("TAB", "ENTER")
    assert browser.run("return location.hash") == "#main"
    assert browser.run("return document.getElementById('main').contains(document.activeElement)")


class TestLive:
    """The page follows the backend without being loaded again."""

    def test_a_change_appears_and_the_focus_stays(self, browser: Browser, pages: Pages, backend: MemoryBackend) -> None:
        browser.open(pages.address)
        browser.open(pages["fleet"])
        browser.run("document.querySelector(`a.pod[href$='${arguments[0]}']`).focus()", pages.pod)
        before = browser.focused()
        backend.snapshot_now = with_problem(backend.snapshot_now, pages.pod)
        browser.wait_for("document.querySelector('a.pod-failed')", what="the pod that failed")
        assert browser.focused() == before

    def test_an_open_table_stays_open(self, browser: Browser, pages: Pages, backend: MemoryBackend) -> None:
        browser.open(pages.address)
        browser.driver.find_element("css selector", "figure details summary").click()
        backend.snapshot_now = later(backend.snapshot_now)
        browser.run("window.events = 0; document.body.addEventListener('sse:series', () => window.events++)")
        browser.wait_for("window.events > 1", what="two updates")
        assert browser.num("figure details[open]") == 1

    def test_an_end_of_the_console_is_said(self, browser: Browser, pages: Pages, stop: "Stop") -> None:
        browser.open(pages.address)
        browser.wait_for("document.querySelector('#connection')")
        stop()
        browser.wait_for("!document.querySelector('#connection').hidden", what="the notice")
        assert "does not answer" in browser.text("#connection")
        browser.console()  # Chromium logs the refused connections


def test_a_thousand_pods_and_two_hundred_versions_are_shown(browser: Browser, large: Pages) -> None:
    browser.open(large.address)
    browser.open(large["fleet"])
    assert browser.num("a.pod") == 1000
    browser.open(large["versions"])
    assert browser.num("table.data tbody tr") >= 200


def with_problem(snapshot: Snapshot, name: str) -> Snapshot:
    """The same state, in which a pod has failed."""
    (one, *others) = snapshot.speculators
    pods = tuple(replace(pod, state="failed", problem="out of memory") if pod.name == name else pod for pod in one.pods)
    return later(replace(snapshot, speculators=(replace(one, pods=pods), *others)))


def later(snapshot: Snapshot) -> Snapshot:
    return replace(snapshot, time=snapshot.time + timedelta(seconds=1))


@pytest.fixture
def _unused() -> Snapshot:
    return state()
