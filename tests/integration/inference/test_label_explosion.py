"""Whatever clients put into headers, bodies and paths, no label of a metric has a value that a client chose."""

import secrets
from pathlib import Path

import pytest
from tests.support.inference import MODEL, RunningPod, running_pod
from tests.support.registry import RegistryProcess
from tests.support.wait import until

NUM_REQUESTS = 80


async def num_series(pod: RunningPod) -> int:
    """Lines of the metrics, but for their help."""
    page = (await pod.http.get("/metrics")).text
    return sum(not line.startswith("#") for line in page.splitlines())


async def ask_oddly(pod: RunningPod, number: int) -> None:
    """Requests with new values wherever a client may put one."""
    odd = f"{number}-{secrets.token_hex(8)}"
    headers = {
        "X-Request-Id": odd,
        "User-Agent": odd,
        "Authorization": f"Bearer {odd}{odd}",
        f"X-{odd}": odd,
    }
    body = {"model": MODEL, "prompt": odd, "max_tokens": 1, "user": odd, "updraft": {"domain": odd}}
    assert (await pod.http.post("/v1/completions", json=body, headers=headers)).status_code == 200
    await pod.http.post("/v1/completions", json={**body, "model": odd}, headers=headers)
    await pod.http.get(f"/{odd}?{odd}", headers=headers)


@pytest.mark.attack(
    boundary="client",
    attack="hundreds of invented domains, paths, models, users, keys, agents and request IDs",
    outcome="the number of metrics stays the same, in the pod and in the registry",
)
async def test_no_header_body_or_path_makes_a_new_series(tmp_path: Path) -> None:
    with RegistryProcess(tmp_path) as registry:
        async with running_pod(tmp_path, registry_address=registry.address) as pod:
            await pod.counts("updraft_inference_registry_connected", 1)
            for number in range(NUM_REQUESTS // 4):
                await ask_oddly(pod, number)
            before = await num_series(pod)
            for number in range(NUM_REQUESTS):
                await ask_oddly(pod, number)
            assert await num_series(pod) == before

            reports = registry.metric("updraft_registry_reports_total")
            await until(lambda: registry.metric("updraft_registry_reports_total") > reports + 1, what="a new report")
            assert sum("domain=" in line for line in registry.fetch("/metrics").splitlines()) <= 2 * 17
