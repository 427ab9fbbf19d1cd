"""`kubectl updraft ui` through the real kubectl on the real API server: decisions with the rights of the person."""

from collections.abc import Callable

from tests.browser.browser import Browser as Chromium
from tests.cluster.access import Json
from tests.cluster.chromium import chromium
from tests.cluster.consoles import console
from tests.cluster.crds import crds
from tests.cluster.kubectl import Kubectl, admin, as_user, path, qwen, rollout, viewer

__all__ = ["admin", "as_user", "chromium", "crds", "path", "qwen", "viewer"]  # fixtures


def test_a_pin_and_a_roll_back_by_form_are_fields_of_the_resource(admin: Kubectl, qwen: Callable[[], Json]) -> None:
    with console(admin) as browser:
        assert "version 2" in browser.text("/s/qwen/rollout")
        assert browser.decide("/s/qwen/confirm/pin?version=4").status_code == 303
        assert rollout(qwen())["pinnedVersion"] == 4
        history = browser.page("/s/qwen/history")
        link = history.partition("Roll back to version 1")[0].rpartition('href="')[2].partition('"')[0]
        assert browser.decide(link).status_code == 303
        assert rollout(qwen())["pinnedVersion"] == 1
    owners = [entry["manager"] for entry in qwen()["metadata"]["managedFields"]]
    assert "kubectl-updraft" in owners


def test_a_person_who_may_only_look_sees_disabled_buttons_and_is_refused(
    viewer: Kubectl, qwen: Callable[[], Json]
) -> None:
    before = qwen()
    with console(viewer) as browser:
        assert "version 2" in browser.text("/s/qwen/rollout")
        history = browser.page("/s/qwen/history")
        assert history.count('aria-disabled="true"') == 4
        assert "your role does not let you patch adaptivespeculators.updraft.dev qwen" in history
        assert browser.decide("/s/qwen/confirm/pin?version=1").status_code == 403
        assert "The pods cannot be read: Pods is forbidden" in browser.text("/s/qwen/fleet")
        assert 'cannot create resource "serviceaccounts/token"' in browser.text("/s/qwen/rollout")
    assert qwen() == before


def test_a_pin_and_a_roll_back_by_click_are_fields_of_the_resource(
    admin: Kubectl, qwen: Callable[[], Json], chromium: Chromium
) -> None:
    with console(admin) as client:
        chromium.open(client.address)
        chromium.open(f"{client.origin}/s/qwen/versions/4")
        chromium.click("Pin this version")
        assert "All pods load version 4 now" in chromium.text("main")
        chromium.click("Pin it")
        assert rollout(qwen())["pinnedVersion"] == 4
        chromium.click("Roll back to version 1")
        chromium.click("Pin it")
        assert rollout(qwen())["pinnedVersion"] == 1
        chromium.click("End the pin")
        chromium.click("End the pin")
        assert "pinnedVersion" not in rollout(qwen())
        chromium.leave()


def test_a_person_who_may_only_look_cannot_click_and_reads_why(
    viewer: Kubectl, qwen: Callable[[], Json], chromium: Chromium
) -> None:
    before = qwen()
    with console(viewer) as client:
        chromium.open(client.address)
        for page in ("rollout", "history", "versions/2"):
            chromium.open(f"{client.origin}/s/qwen/{page}")
            assert chromium.num(".actions a") == 0
            assert chromium.num(".actions [aria-disabled=true]") > 1
            assert "your role does not let you patch adaptivespeculators.updraft.dev qwen" in chromium.text(".actions")
        chromium.open(f"{client.origin}/s/qwen/confirm/pin?version=1")
        assert chromium.num("form button:disabled") == 1
        chromium.leave()
    assert qwen() == before
