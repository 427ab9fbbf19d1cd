"""The console of `kubectl updraft ui` against an API server: decisions are patches, and rights are asked for."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from tests.support import speculator_objects as objects
from tests.support.api_server import ApiServer, api_server
from tests.support.console import Browser, Form
from tests.support.speculator_objects import moment
from tests.support.wait import wait_until

from updraft_cli.backends.cluster import ClusterBackend
from updraft_cli.backends.cluster_client import KubeContext
from updraft_cli.ui.server import serving
from updraft_inference.metrics import Metrics

SPECULATORS, VERSIONS, IMPORTS = "adaptivespeculators", "draftversions", "draftimports"


@pytest.fixture
def api(tmp_path: Path) -> Iterator[ApiServer]:
    """Version 2 of qwen serves after version 1; one of its two pods cannot pull its image."""
    with api_server(tmp_path) as server:
        server.put(SPECULATORS, objects.speculator())
        history = [moment(1, "Stable", "it won", "gate"), moment(9, "Superseded", "version 2 took over", "gate")]
        server.put(VERSIONS, objects.version(1, "Superseded", reason="version 2 took over", history=history))
        server.put(VERSIONS, objects.version(2, "Stable", reason="it won", history=[moment(8, "Stable", "it won")]))
        server.pods += [pod("qwen-serving-1", is_ready=True), pod("qwen-serving-2", is_ready=False)]
        yield server


@pytest.fixture
def browser(api: ApiServer) -> Iterator[Browser]:
    backend = ClusterBackend(context=KubeContext(kubeconfig=api.kubeconfig))
    with serving(backend) as console, Browser(console.address) as visitor:
        yield visitor


def pod(name: str, *, is_ready: bool) -> dict[str, Any]:
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
    return {
        "metadata": {
            "namespace": "team",
            "name": name,
            "labels": {"updraft.dev/speculator": "qwen", "app.kubernetes.io/component": "serving"},
        },
        "spec": {
            "nodeName": "node-7",
            "containers": [
                {
                    "image": "updraft-inference:1",
                    "ports": [{"name": "http", "containerPort": 8000}],
                    "resources": {"limits": {"memory": "1Gi", "nvidia.com/gpu": "1"}},
                }
            ],
        },
        "status": {
            "startTime": objects.SINCE,
            "conditions": [
                {"type": "Ready", "status": "True" if is_ready else "False", "reason": "ContainersNotReady"}
            ],
            "containerStatuses": [{"restartCount": 2, "state": {"running": {}} if is_ready else waiting}],
        },
    }


def test_the_pages_show_the_resource(browser: Browser) -> None:
    overview = browser.text("/")
    assert "team/qwen ready" in overview
    assert "2 of 2 ready" in overview
    assert "superseded" in browser.text("/s/qwen/versions")
    history = browser.text("/s/qwen/history")
    assert "Stable" not in history
    assert "1 superseded stable gate version 2 took over" in history


def test_an_import_that_is_no_version_yet_is_on_the_page_of_versions(browser: Browser, api: ApiServer) -> None:
    assert "DraftImport" not in browser.text("/s/qwen/versions")
    running = objects.condition("Ready", "False", "Importing", "a Job imports it")
    of_another = objects.draft_import(running)
    of_another["metadata"]["name"], of_another["spec"]["speculatorRef"]["name"] = "not-mine", "other"
    for each in (of_another, objects.draft_import(running)):
        api.put(IMPORTS, each)
    says = "The DraftImport qwen-mine has not finished (Importing): a Job imports it."
    wait_until(lambda: says in browser.text("/s/qwen/versions"), what="the import")
    assert "not-mine" not in browser.text("/s/qwen/versions")


def test_a_pin_is_a_patch_of_the_resource_and_asks_for_no_reason(browser: Browser, api: ApiServer) -> None:
    assert "reason" not in Form.of(browser.page("/s/qwen/confirm/pin?version=1")).fields
    assert browser.decide("/s/qwen/confirm/pin?version=1").status_code == 303
    assert api.patches == [{"spec": {"rollout": {"pinnedVersion": 1}}}]
    assert "Version 1 is pinned for qwen" in browser.text("/s/qwen/history")
    assert browser.decide("/s/qwen/confirm/unpin").status_code == 303
    assert api.patches[-1] == {"spec": {"rollout": {"pinnedVersion": None}}}


def test_a_person_without_rights_sees_why_no_button_works(browser: Browser, api: ApiServer) -> None:
    api.is_reader = True
    shown = browser.text("/s/qwen/history")
    reason = "your role does not let you patch adaptivespeculators.updraft.dev qwen in team"
    assert f"Pause {reason}" in shown
    assert api.reviews[-1] == {
        "group": "updraft.dev",
        "resource": SPECULATORS,
        "verb": "patch",
        "name": "qwen",
        "namespace": "team",
    }
    fleet = "The pods cannot be read: Pods is forbidden."
    wait_until(lambda: fleet in browser.text("/s/qwen/fleet"), what="the page without pods")
    assert api.patches == []


def test_rights_that_end_while_a_form_is_open_end_in_the_api_servers_sentence(browser: Browser, api: ApiServer) -> None:
    form = Form.of(browser.page("/s/qwen/confirm/pause"))
    api.is_reader = True
    refused = browser.http.post(form.action, data=form.fields, headers={"Origin": browser.origin})
    assert refused.status_code == 409
    assert "is forbidden" in refused.text


def test_pods_are_grouped_by_what_kubernetes_knows(browser: Browser) -> None:
    by_device = browser.text("/s/qwen/fleet?by=device")
    assert "requests 1 nvidia.com/gpu: 2 pods" in by_device
    assert "by version" not in by_device
    failed = browser.text("/s/qwen/fleet/qwen-serving-2")
    assert "failed ImagePullBackOff: no such image." in failed
    assert "Its metrics cannot be read" in failed


def test_one_pods_page_reads_its_metrics_through_the_api_server(browser: Browser, api: ApiServer) -> None:
    registry = CollectorRegistry()
    Metrics(registry).draft_version.set(2)
    api.metrics["http:qwen-serving-1:8000"] = generate_latest(registry).decode()
    shown = browser.text("/s/qwen/fleet/qwen-serving-1")
    assert "node node-7" in shown
    assert "restarts 2" in shown
    assert "Its own metrics holds version 2" in shown, shown


def test_a_resource_that_is_deleted_is_told(browser: Browser, api: ApiServer) -> None:
    del api.objects[SPECULATORS]["qwen"]
    events = browser.events("overview")
    next(data for event, data in events if event == "live-speculators" and "There is no speculator" in data)
    assert browser.http.get("/s/qwen/rollout").status_code == 404
