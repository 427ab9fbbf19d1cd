"""An open page follows the backend, and neither the focus nor anything that a person opened is lost."""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest
from tests.browser.browser import FIRST_LOAD_BYTES, Browser
from tests.browser.pages import Pages, pages_of
from tests.support.console import Memory, MemoryBackend, memory_backend, state

from updraft_chassis.errors import Unavailable
from updraft_cli.ui.server import serving

_SEE = """
Object.defineProperty(document, 'hidden', {configurable: true, get: () => arguments[0] === 'hidden'});
document.dispatchEvent(new Event('visibilitychange'));
"""
_COUNT = "window.events = 0; document.body.addEventListener('sse:series', () => window.events++)"


def test_a_change_appears_and_the_focus_stays(browser: Browser, pages: Pages, backend: MemoryBackend) -> None:
    browser.open(pages.address)
    browser.open(pages["fleet"])
    browser.run("document.querySelector(`a.pod[href$='${arguments[0]}']`).focus()", pages.pod)
    fail(backend.memory, pages.pod)
    browser.wait_for("document.querySelector('a.pod-failed')", what="the pod that failed")
    assert browser.run("return document.activeElement.href").endswith(pages.pod)


def test_an_open_table_stays_open(browser: Browser, pages: Pages) -> None:
    browser.open(pages.address)
    browser.open(pages["rollout"])
    browser.driver.find_element("css selector", "#live-rollout summary").click()
    browser.run(_COUNT)
    browser.wait_for("window.events > 2", what="updates")
    assert browser.num("#live-rollout details[open]") == 1


def test_a_chart_grows(browser: Browser, pages: Pages) -> None:
    browser.open(pages.address)
    time = "document.querySelector('.u-legend .u-value').textContent"
    first = browser.wait_for(f"document.querySelector('canvas') && {time}", what="a chart")
    browser.wait_for(f"{time} !== arguments[0]", first, what="a newer point")


def test_seven_open_pages_load(browser: Browser, pages: Pages) -> None:
    browser.open(pages.address)
    first = browser.driver.current_window_handle
    opened = []
    for _ in range(6):  # a browser has six connections to one address
        browser.driver.switch_to.new_window("tab")
        opened.append(browser.driver.current_window_handle)
        browser.driver.get(pages["rollout"])
        browser.run(_COUNT)
        browser.wait_for("window.events > 0", what="the stream of the page")
    for tab in opened:
        browser.driver.switch_to.window(tab)
        browser.driver.close()
    browser.driver.switch_to.window(first)
    browser.run(_COUNT)
    browser.wait_for("window.events > 2", what="updates of the page that was hidden")


def test_a_hidden_page_gives_its_connection_back_and_goes_on_when_it_is_seen(browser: Browser, pages: Pages) -> None:
    browser.open(pages.address)
    browser.run(_COUNT)
    browser.wait_for("window.events > 0", what="updates")
    age = browser.text("#live-age")
    browser.run(_SEE, "hidden")
    streams = "performance.getEntriesByType('resource').filter(one => one.name.includes('/events')).length"
    browser.wait_for(f"{streams} === 1", what="the end of the stream")
    browser.run("window.events = 0")
    browser.run(_SEE, "visible")
    browser.wait_for("window.events > 1", what="updates of another stream")
    browser.wait_for(
        "document.querySelector('#live-age').textContent.trim() !== arguments[0]", age, what="a newer state"
    )
    assert browser.text("#live-age").startswith("As of ")


def test_the_navigation_and_the_charts_of_a_new_speculator_appear(
    browser: Browser, pages: Pages, backend: MemoryBackend
) -> None:
    browser.open(pages.address)
    (one,) = backend.memory.snapshot.speculators
    other = replace(one, speculator=replace(one.speculator, name="gemma"))
    backend.memory.snapshot = replace(backend.memory.snapshot, speculators=(one, other))
    browser.wait_for("document.querySelector('.speculators a[href=\"/s/gemma/rollout\"]')", what="the navigation")
    assert browser.num("section.charts") == 2


def test_an_outage_of_the_backend_is_said_and_ends(browser: Browser, pages: Pages, backend: MemoryBackend) -> None:
    browser.open(pages.address)
    backend.memory.problem = Unavailable("no registry answers at 127.0.0.1:50051")
    browser.wait_for("document.querySelector('#live-notice').textContent.includes(arguments[0])", "No registry answers")
    backend.memory.problem = None
    browser.wait_for("!document.querySelector('#live-notice').textContent.trim()", what="the end of the notice")


def test_an_end_of_the_console_is_said(browser: Browser, ending: tuple[Pages, ExitStack]) -> None:
    pages, console = ending
    browser.open(pages.address)
    browser.run(_COUNT)
    browser.wait_for("window.events > 0", what="the stream is open")
    console.close()
    browser.wait_for(
        "document.querySelector('#connection')?.textContent.includes('does not answer')", what="the notice"
    )
    browser.leave()
    browser.console()  # Chromium logs the connections that were refused


def test_a_late_answer_does_not_say_that_a_page_that_follows_again_is_away(browser: Browser, pages: Pages) -> None:
    browser.open(pages.address)
    browser.run(_COUNT)
    browser.wait_for("window.events > 0", what="the stream is open")
    browser.run("""
        const fetched = window.fetch;
        window.fetch = (address, options) => address.includes('icon')
            ? new Promise(resolve => { window.answer = () => resolve({status: 0}); }) : fetched(address, options);
        for (const kind of ['htmx:sseError', 'htmx:sseOpen']) document.body.dispatchEvent(new Event(kind));
        window.answer();
    """)
    browser.run(_COUNT)
    browser.wait_for("window.events > 0", what="the next update")
    assert browser.run("return document.querySelector('#connection').hidden")


def test_a_page_of_a_console_that_was_started_again_says_where_to_go(
    browser: Browser, backend: MemoryBackend, ending: tuple[Pages, ExitStack]
) -> None:
    pages, console = ending
    browser.open(pages.address)
    browser.run(_COUNT)
    browser.wait_for("window.events > 0", what="the stream is open")
    console.close()
    with serving(backend, port=int(pages.origin.rpartition(":")[2])):
        browser.wait_for(
            "document.querySelector('#connection')?.textContent.includes('another token')", what="the notice"
        )
        browser.leave()
        browser.console()  # Chromium logs the connections that were refused


def test_chart_times_are_utc_wherever_the_browser_is(browser: Browser, pages: Pages) -> None:
    browser.driver.execute_cdp_cmd("Emulation.setTimezoneOverride", {"timezoneId": "Asia/Tokyo"})
    try:
        browser.open(pages.address)
        shown = browser.wait_for(
            "document.querySelector('canvas') && document.querySelector('.u-legend .u-value').textContent"
        )
        one = "document.querySelector('.u-legend').closest('figure.chart')"
        rows = browser.run(f"return [...{one}.querySelectorAll('td.mono')].map(cell => cell.textContent)")
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setTimezoneOverride", {"timezoneId": "UTC"})
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", shown), "as in the tables of the pages"
    assert shown.split(" ")[1][:5] in {row[:5] for row in rows[:5]}, "the newest ones"


def test_a_thousand_pods_and_two_hundred_versions_are_shown_and_followed(browser: Browser) -> None:
    backend = memory_backend(state(num_pods=1000, num_versions=200))
    with serving(backend) as console:
        pages = pages_of(console.address, backend.memory.snapshot)
        browser.open(pages.address)
        browser.open(pages["versions"])
        assert browser.num("#live-versions tbody tr") == 200
        browser.forget_files()
        browser.open(pages["fleet"])
        assert browser.num("a.pod") == 1000
        assert browser.transferred() <= FIRST_LOAD_BYTES
        fail(backend.memory, backend.memory.snapshot.speculators[0].pods[-1].name)
        browser.wait_for("document.querySelector('a.pod-failed')", what="the pod that failed")
        assert browser.num("a.pod") == 1000
        browser.leave()


@pytest.fixture
def ending(backend: MemoryBackend) -> Iterator[tuple[Pages, ExitStack]]:
    """A console that a test ends."""
    with ExitStack() as stack:
        console = stack.enter_context(serving(backend))
        yield pages_of(console.address, backend.memory.snapshot), stack


def fail(memory: Memory, name: str) -> None:
    """One pod fails."""
    (one,) = memory.snapshot.speculators
    pods = tuple(replace(pod, state="failed", problem="out of memory") if pod.name == name else pod for pod in one.pods)
    memory.snapshot = replace(memory.snapshot, speculators=(replace(one, pods=pods),))
