"""Who reaches the console, and what a page may do: over HTTP, on a state from memory."""

import re
from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest
from tests.support.console import Browser, Form, MemoryBackend, memory_backend, state

from updraft_chassis.errors import Forbidden
from updraft_cli.backends.drafts import DomainAcceptance
from updraft_cli.backends.protocol import Verb
from updraft_cli.backends.speculators import DomainChange
from updraft_cli.ui.security import Access
from updraft_cli.ui.server import serving

SCRIPT = "<script>alert(1)</script>"
ROUTES = (
    *(
        "/",
        "/s/qwen/rollout",
        "/s/qwen/versions",
        "/s/qwen/versions/2",
        "/s/qwen/versions/1/diff/2",
        "/s/qwen/learning",
    ),
    *("/s/qwen/diff?old=1&new=2", "/s/qwen/fleet", "/s/qwen/fleet/qwen-serving-7d4b9c-00001", "/s/qwen/traffic"),
    *("/s/qwen/history", "/s/qwen/confirm/pin", "/s/qwen/charts/acceptance.json", "/events?page=overview"),
    *("/static/console.css", "/nothing"),
)


@pytest.fixture
def backend() -> MemoryBackend:
    return memory_backend(state())


@pytest.fixture
def browser(backend: MemoryBackend) -> Iterator[Browser]:
    with serving(backend) as console, Browser(console.address) as visitor:
        yield visitor


@pytest.fixture
def stranger(browser: Browser) -> Iterator[httpx.Client]:
    """A client without the cookie."""
    with httpx.Client(base_url=browser.origin, trust_env=False) as http:
        yield http


def test_without_the_token_no_route_answers(stranger: httpx.Client) -> None:
    for route in ROUTES:
        refused = stranger.get(route)
        assert (refused.status_code, refused.text.count("\n")) == (403, 1), route
    stranger.headers["Origin"] = str(stranger.base_url).rstrip("/")
    assert stranger.post("/s/qwen/decide/pause").status_code == 403


def test_the_token_becomes_a_cookie_that_no_script_and_no_other_site_can_use(
    browser: Browser, stranger: httpx.Client
) -> None:
    exchanged = stranger.get(browser.address)
    assert (exchanged.status_code, browser.address in exchanged.text) == (200, False)
    assert 'content="0; url=/"' in exchanged.text
    cookie = exchanged.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert f"updraft-console-{browser.origin.rpartition(':')[2]}=" in cookie
    assert stranger.get("/").status_code == 200


def test_a_wrong_token_is_refused(stranger: httpx.Client) -> None:
    assert stranger.get("/?token=wrong").status_code == 403
    stranger.cookies.set(f"updraft-console-{stranger.base_url.port}", "wrong")
    assert stranger.get("/").status_code == 403


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1", "127.0.0.1:1", ""])
def test_another_host_is_refused_even_with_the_cookie(browser: Browser, host: str) -> None:
    assert browser.http.get("/", headers={"Host": host}).status_code in {400, 403}


def test_browsers_leave_port_80_out_of_the_host() -> None:
    assert {"127.0.0.1", "localhost:80"} <= Access(port=80).hosts
    assert "http://localhost" in Access(port=80).origins
    assert "127.0.0.1" not in Access(port=8080).hosts


def test_localhost_is_the_same_console(browser: Browser) -> None:
    port = browser.origin.rpartition(":")[2]
    assert browser.http.get("/", headers={"Host": f"localhost:{port}"}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1", None])
def test_a_form_of_another_origin_changes_nothing(browser: Browser, backend: MemoryBackend, origin: str | None) -> None:
    form = Form.of(browser.page("/s/qwen/confirm/pause"))
    headers = {} if origin is None else {"Origin": origin}
    assert browser.http.post(form.action, data=form.fields, headers=headers).status_code == 403
    assert backend.memory.decisions == []


@pytest.mark.parametrize("secret", ["", "wrong", None])
def test_a_form_without_the_hidden_field_changes_nothing(
    browser: Browser, backend: MemoryBackend, secret: str | None
) -> None:
    fields = {} if secret is None else {"csrf": secret}
    sent = browser.http.post("/s/qwen/decide/pause", data=fields, headers={"Origin": browser.origin})
    assert sent.status_code == 403
    assert backend.memory.decisions == []


def test_looking_decides_nothing(browser: Browser, backend: MemoryBackend) -> None:
    assert browser.http.get("/s/qwen/decide/pause").status_code == 405
    assert browser.http.get("/s/qwen/confirm/pause").status_code == 200
    assert backend.memory.decisions == []


def test_every_answer_forbids_inline_scripts_frames_and_other_sites(browser: Browser, stranger: httpx.Client) -> None:
    for answer in (*(browser.http.get(route) for route in ROUTES if "events" not in route), stranger.get("/")):
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] in {"no-store", "no-cache"}


def test_no_page_needs_what_the_policy_forbids(browser: Browser) -> None:
    for route in ROUTES:
        if "events" not in route:
            html = browser.http.get(route).text
            assert "<style" not in html, route
            assert " style=" not in html, route
            assert "javascript:" not in html, route
            assert " onclick=" not in html, route
            assert set(re.findall(r"<script[^>]*>(.*?)</script>", html, re.DOTALL)) <= {""}, route


def test_names_and_reasons_of_others_are_shown_as_text(backend: MemoryBackend) -> None:
    one = backend.memory.snapshot.speculators[0]
    domains = (DomainAcceptance(domain=SCRIPT, stable=2.0, candidate=2.1),)
    assert one.speculator.trial is not None
    trial = replace(one.speculator.trial, domains=(DomainChange(domain=SCRIPT, acceptance_length=None),))
    hostile = replace(
        one,
        speculator=replace(
            one.speculator,
            message=SCRIPT,
            domains=domains,
            trial=trial,
            trainer_message=SCRIPT,
            paused=True,
            pause_reason=SCRIPT,
        ),
        pods=(replace(one.pods[0], name=SCRIPT, problem=SCRIPT, engine=SCRIPT, device=SCRIPT), *one.pods[1:]),
        drafts=tuple(replace(draft, reason=SCRIPT) for draft in one.drafts),
        history=tuple(replace(entry, reason=SCRIPT, actor=SCRIPT) for entry in one.history),
    )
    backend.memory.snapshot = replace(backend.memory.snapshot, speculators=(hostile,))
    with serving(backend) as console, Browser(console.address) as browser:
        pages = {
            page: browser.page(f"/s/qwen/{page}") for page in ("rollout", "versions", "learning", "fleet", "traffic")
        }
        pages |= {"overview": browser.page("/"), "history": browser.page("/s/qwen/history")}
        pages["version"] = browser.page("/s/qwen/versions/2")
        pages["device"] = browser.page("/s/qwen/fleet?by=device")
        pages["pod"] = browser.page(f"/s/qwen/fleet/{SCRIPT}")
        streamed = next(data for event, data in browser.events("history", "qwen") if event == "live-history")
    for page, html in {**pages, "events": streamed}.items():
        assert SCRIPT not in html, page
        assert "&lt;script&gt;alert(1)" in html, page


def test_a_person_without_rights_sees_the_buttons_disabled_with_the_reason(
    browser: Browser, backend: MemoryBackend
) -> None:
    backend.memory.refusal = "your role does not let you patch adaptivespeculators.updraft.dev qwen in team"
    shown = browser.page("/s/qwen/history")
    assert 'class="button" href=' not in shown
    assert shown.count('aria-disabled="true"') == shown.count('aria-describedby="why-0"') == 4
    assert f'id="why-0">{backend.memory.refusal}<' in shown
    confirmation = browser.page("/s/qwen/confirm/pause")
    assert '<button type="submit" disabled>' in confirmation
    assert backend.memory.refusal in confirmation


def test_a_form_of_a_person_without_rights_is_refused(browser: Browser, backend: MemoryBackend) -> None:
    form = Form.of(browser.page("/s/qwen/confirm/pause"))
    with serving(backend) as console, Browser(console.address) as another:
        backend.memory.refusal = "you may not"
        fields = {"csrf": Form.of(another.page("/s/qwen/confirm/pause")).fields["csrf"]}
        refused = another.http.post(form.action, data=fields, headers={"Origin": another.origin})
    assert refused.status_code == 403
    assert "You may not." in refused.text
    assert backend.memory.decisions == []


def test_no_form_of_one_console_decides_at_another(browser: Browser, backend: MemoryBackend) -> None:
    able = memory_backend(state())
    with serving(able) as console, Browser(console.address) as another:
        form = Form.of(browser.page("/s/qwen/confirm/pause"))
        another.http.cookies.update(browser.http.cookies)  # a browser sends both to both
        refused = [
            another.http.post(form.action, data=form.fields, headers={"Origin": origin})
            for origin in (browser.origin, another.origin)
        ]
    assert [answer.status_code for answer in refused] == [403, 403]
    assert "this form is not one of the console's" in refused[1].text
    assert able.memory.decisions == backend.memory.decisions == []


def test_what_the_backend_refuses_in_the_end_is_shown(browser: Browser, backend: MemoryBackend) -> None:
    form = Form.of(browser.page("/s/qwen/confirm/pause"))
    backend.memory.problem = Forbidden("the token has the role read")
    refused = browser.http.post(form.action, data=form.fields, headers={"Origin": browser.origin})
    assert (refused.status_code, "The token has the role read." in refused.text) == (409, True)


def test_a_decision_carries_its_version_and_its_reason(browser: Browser, backend: MemoryBackend) -> None:
    assert browser.decide("/s/qwen/confirm/pin?version=2", reason=" it is slow ").status_code == 303
    assert browser.decide("/s/qwen/confirm/resume").status_code == 303
    assert backend.memory.decisions == [("qwen", Verb.PIN, 2, "it is slow"), ("qwen", Verb.RESUME, None, "")]


@pytest.mark.parametrize("version", ["", "x", "-1", "99999999999999999999", "٣"])
def test_a_version_that_is_no_number_is_refused_in_a_sentence(
    browser: Browser, backend: MemoryBackend, version: str
) -> None:
    refused = browser.decide("/s/qwen/confirm/pin", version=version)
    assert refused.status_code == 400
    assert "is not the number of a version" in refused.text
    assert backend.memory.decisions == []


def test_a_form_that_is_too_long_is_refused(browser: Browser, backend: MemoryBackend) -> None:
    assert browser.decide("/s/qwen/confirm/pause", reason="x" * 20_000).status_code == 400
    assert backend.memory.decisions == []


def test_two_consoles_of_one_machine_do_not_share_their_cookies(browser: Browser, backend: MemoryBackend) -> None:
    with serving(backend) as other, Browser(other.address) as second:
        second.http.cookies.update(browser.http.cookies)
        assert second.http.get("/").status_code == 200
        assert browser.http.get("/").status_code == 200
        browser.http.cookies = httpx.Cookies({other.access.cookie: other.access.token})
        assert browser.http.get("/").status_code == 403
