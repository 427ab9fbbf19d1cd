"""A click in the console of a cluster patches the resource, and the operator hands it to a real registry."""

import pytest
from tests.browser.browser import Browser
from tests.cluster.chromium import chromium
from tests.cluster.consoles import console
from tests.cluster.kubectl import Kubectl, admin, as_user, path, rollout
from tests.cluster.operator.conftest import Running
from tests.cluster.operator.registries import Shelf
from tests.cluster.operator.subject import Subject
from tests.support.registry import RegistryProcess
from tests.support.wait import wait_until

from updraft_operator.api import names

__all__ = ["admin", "as_user", "chromium", "path"]  # fixtures


@pytest.fixture(scope="module")
def settings(registry: RegistryProcess) -> dict[str, object]:
    return {"registry_address": registry.address}


@pytest.fixture
def promoted(operator: Running, subject: Subject, shelf: Shelf) -> Subject:
    """A speculator whose second version serves after its first one, in the registry and in the resource."""
    subject.create(rollout={"strategy": "Immediate"})
    subject.wait_until_built()
    subject.run(names.REGISTRY)
    subject.wait_for("RegistryReady", "True", "Connected")
    for number in (1, 2):
        assert shelf.publish(number) == number
    roles = {"stable": 2, "previous": 1}
    wait_until(
        lambda: {role: subject.get()["status"].get("versions", {}).get(role) for role in roles} == roles,
        what="the versions in the status",
    )
    return subject


def pinned(shelf: Shelf) -> int | None:
    """The pin of the registry."""
    state = shelf.state()
    return state.pinned if state.HasField("pinned") else None


def test_a_pin_and_a_roll_back_by_click_reach_the_resource_and_the_registry(
    promoted: Subject, shelf: Shelf, admin: Kubectl, chromium: Browser
) -> None:
    with console(admin) as client:
        pages = f"{client.origin}/s/{promoted.name}"
        chromium.open(client.address)
        chromium.open(f"{pages}/versions/2")
        chromium.click("Pin this version")
        chromium.click("Pin it")
        assert rollout(promoted.get())["pinnedVersion"] == 2
        wait_until(lambda: pinned(shelf) == 2, what="the registry's pin")
        chromium.open(f"{pages}/history")
        chromium.click("End the pin")
        chromium.click("End the pin")
        assert "pinnedVersion" not in rollout(promoted.get())
        wait_until(lambda: pinned(shelf) is None, what="the end of the registry's pin")
        chromium.open(f"{pages}/history")
        chromium.click("Roll back to version 1")
        assert "All pods load version 1 now" in chromium.text("main")
        chromium.click("Pin it")
        assert rollout(promoted.get())["pinnedVersion"] == 1
        wait_until(lambda: pinned(shelf) == 1, what="the registry is pinned to the version before")
        wait_until(lambda: "pinned" in chromium.text("main").lower(), what="the page says that a version is pinned")
        chromium.leave()
