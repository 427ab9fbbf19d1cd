"""The bundled Redis with TLS, as the chart runs it: certificates and CAs rotate under writes, and no trace is lost."""

import asyncio
import base64
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import pytest
from tests.chart.chart import Document, one, rendered
from tests.support.clock import ManualClock
from tests.support.manifests import CONFIG
from tests.support.mounts import Mount
from tests.support.ports import free_port
from tests.support.wait import until
from tests.unit.operator.memory_cluster import MemoryCluster
from tests.unit.operator.world import run_now

from updraft_chassis import streams
from updraft_chassis.errors import Unavailable
from updraft_operator.manifests.tls.terms import CertificateOrder, Lives, OwnSecrets, Tls, TlsMode
from updraft_operator.watching.certificates import Certificates

PASSWORD = "p" * 32
SECRET = "updraft-redis-tls"  # noqa: S105 - a name
LIVES = Lives(ca_s=60.0, certificate_s=15.0)
FORMER_CA_S = 38.0
"""Age of the first CA at the start: it is succeeded after two seconds, and ends after 22."""
LONG_ENOUGH_S = 30.0
_FOLDERS = ("/run/redis", "/etc/redis-tls", "/etc/redis", "/data")


@dataclass
class Operator:
    """One that keeps the certificate of a Redis on this machine."""

    clock: ManualClock = field(default_factory=ManualClock)
    cluster: MemoryCluster = field(default_factory=MemoryCluster)

    def __post_init__(self) -> None:
        self._set_clock(time.time() - FORMER_CA_S)
        self.certificates = Certificates(
            self.cluster,
            replace(CONFIG, tls=Tls(mode=TlsMode.SELF_SIGNED, lives=LIVES)),
            OwnSecrets(
                namespace=CONFIG.namespace,
                authority="updraft-ca",
                redis=CertificateOrder(secret=SECRET, name="localhost"),
            ),
            self.clock,
            may_write=lambda: True,
            on_change=lambda: None,
        )
        run_now(self.certificates.refresh())
        self.look()

    def look(self) -> None:
        self._set_clock(time.time())
        run_now(self.certificates.refresh())

    def _set_clock(self, unix_s: float) -> None:
        self.clock.advance(unix_s - self.clock.now())


class Pod:
    """The chart's StatefulSet, with its folders below one of ours."""

    def __init__(self, folder: Path, binaries: Path, operator: Operator) -> None:
        self.port, self._folder, self._operator = free_port(), folder, operator
        self._environment = {"PATH": f"{binaries}:/usr/bin:/bin", "REDISCLI_AUTH": PASSWORD}
        self.server, self.client = Mount(folder / "etc/redis-tls"), Mount(folder / "ca")
        for name in ("run/redis", "etc/redis", "data"):
            (folder / name).mkdir(parents=True)
        for name, content in one(rendered("default"), "ConfigMap", "updraft-redis")["data"].items():
            text = self._here(content).replace("tls-port 6379", f"tls-port {self.port}")
            (folder / "etc/redis" / name).write_text(text)
        self.sync()

    def start(self) -> subprocess.Popen[bytes]:
        container = _container()
        words = [*container["command"], *map(self._here, container["args"])]
        return subprocess.Popen(words, env=self._environment, stdout=subprocess.DEVNULL)

    def sync(self) -> None:
        """As a kubelet does for the Secret of this pod and the ConfigMap of others."""
        data = self._operator.cluster.objects["Secret", CONFIG.namespace, SECRET]["data"]
        self.server.sync({entry: base64.b64decode(data[entry]).decode() for entry in ("tls.crt", "tls.key")})
        self.client.sync({"ca.crt": self._operator.certificates.authorities})

    async def is_ready(self) -> bool:
        """As a kubelet asks."""
        words = map(self._here, _container()["readinessProbe"]["exec"]["command"])
        probe = await asyncio.create_subprocess_exec(*words, env=self._environment, stderr=subprocess.DEVNULL)
        return await probe.wait() == 0

    def url(self, ca_file: Path) -> str:
        return f"rediss://:{PASSWORD}@localhost:{self.port}/0?ssl_ca_certs={ca_file}"

    def shown(self) -> str:
        """The certificate that it shows to others."""
        return ssl.get_server_certificate(("localhost", self.port), timeout=30)

    def _here(self, text: str) -> str:
        marked = text
        for number, folder in enumerate(_FOLDERS):
            marked = marked.replace(folder, f"<{number}>")
        for number, folder in enumerate(_FOLDERS):
            marked = marked.replace(f"<{number}>", f"{self._folder}{folder}")
        return marked


def _container() -> Document:
    stateful_set = one(rendered("default"), "StatefulSet", "updraft-redis")
    (container,) = stateful_set["spec"]["template"]["spec"]["containers"]
    return dict(container)


@pytest.fixture
def pod(short_tmp_path: Path, tls_redis_server: Path) -> Iterator[tuple[Pod, Operator]]:
    operator = Operator()
    made = Pod(short_tmp_path, tls_redis_server.parent, operator)
    process = made.start()
    try:
        yield made, operator
    finally:
        process.terminate()
        process.wait()


async def _append(url: Callable[[], str], num: int) -> None:
    """As many traces, over one new connection."""
    async with streams.connect(url(), timeout=timedelta(seconds=30)) as client:
        producer = streams.Producer(client, "updraft:{a:b:0}:samples:v1", max_bytes=2**20)
        for _ in range(num):
            await producer.append(b"trace")


@pytest.mark.attack(
    boundary="redis",
    attack="certificates and their CA renewed every few seconds under writes",
    outcome="no write fails, and connections stay open",
)
async def test_no_write_fails_while_certificates_and_cas_rotate(pod: tuple[Pod, Operator]) -> None:
    redis, operator = pod
    await until(redis.is_ready, what="Redis")
    url = redis.url(redis.client.folder / "ca.crt")
    own_url = redis.url(Path("/etc/updraft/ca/ca.crt"))
    end, num_fresh, num_kept = asyncio.Event(), 0, 0

    async def kubelet() -> None:
        while not end.is_set():
            operator.look()
            redis.sync()
            assert await redis.is_ready()
            await asyncio.sleep(0.3)

    async def write_anew() -> None:
        nonlocal num_fresh
        while not end.is_set():
            await _append(lambda: url, 2)
            await _append(lambda: operator.certificates.redis_url(own_url), 1)
            num_fresh += 3
            await asyncio.sleep(0.05)

    async def write() -> None:
        nonlocal num_kept
        async with streams.connect(url, timeout=timedelta(seconds=30)) as client:
            producer = streams.Producer(client, "updraft:{a:b:0}:samples:v1", max_bytes=2**24)
            while not end.is_set():
                await producer.append(b"trace")
                num_kept += 1
                await asyncio.sleep(0.05)

    async with asyncio.TaskGroup() as tasks:
        for work in (kubelet, write_anew, write):
            tasks.create_task(work())
        await asyncio.sleep(LONG_ENOUGH_S)
        end.set()

    assert min(num_kept, num_fresh) > 20
    assert len(redis.server.versions) >= 3
    first, last = redis.client.versions[0]["ca.crt"], redis.client.versions[-1]["ca.crt"]
    assert first not in last, "the first CA has ended"
    assert redis.shown() == redis.server.versions[-1]["tls.crt"]
    former = redis.client.folder / "former.crt"
    former.write_text(first)
    with pytest.raises(Unavailable):
        await _append(lambda: redis.url(former), 1)


@pytest.mark.attack(boundary="redis", attack="plaintext to the bundled Redis with TLS", outcome="nothing is answered")
async def test_plaintext_is_not_answered(pod: tuple[Pod, Operator]) -> None:
    redis, _ = pod
    await until(redis.is_ready, what="Redis")
    with pytest.raises(Unavailable):
        await _append(lambda: f"redis://:{PASSWORD}@localhost:{redis.port}/0", 1)
