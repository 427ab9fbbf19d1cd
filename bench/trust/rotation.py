"""Whether anybody notices that certificates and tokens are renewed every ten seconds. See README.md in this folder."""

import argparse
import asyncio
import shutil
import tempfile
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from bench import harness
from bench.harness import Line, Measurements
from rich.text import Text
from tests.support.redis_server import RedisServer
from tests.support.rotation_storm import NUM_CLIENTS, Pace, Seen, storm
from tests.support.tiny_target import make_tiny_target
from tests.support.tiny_tokenizer import write_tokenizer

from updraft_cli import results

SEED = 0
SECONDS = 300.0
MOST_DOWN_S = 2.0


def measured(folder: Path, seconds: float, program: Path | None) -> Seen:
    target = make_tiny_target(write_tokenizer(folder / "tiny"))
    with nullcontext() if program is not None else RedisServer(folder) as plain:
        url = plain.url if plain is not None else ""
        return asyncio.run(storm(folder, target, Pace(), seconds=seconds, redis_program=program, redis_url=url))


def measure(arguments: argparse.Namespace) -> Measurements:
    with tempfile.TemporaryDirectory(prefix="updraft-") as folder:
        seen = measured(Path(folder), arguments.seconds, arguments.server)
    redis = "Redis with TLS" if arguments.server else "Redis without TLS: name a redis-server that has it with --server"
    summary = (
        f"{seen.renewals} renewals, {seen.cas} CAs; {seen.requests} requests of {NUM_CLIENTS} clients;"
        f" {seen.finished} traces, of which the queue dropped {seen.dropped};"
        f" the pod's stream was seen down {seen.streams_ended} times; {redis}"
    )
    return Measurements(
        seed=SEED,
        lines=(
            Line(results.at_most("failed requests", len(seen.failed), 0)),
            Line(results.at_most("traces lost beyond those that the queue counts", seen.lost, 0)),
            Line(results.at_most("longest time without the stream to the registry", seen.down_s, MOST_DOWN_S, "s")),
        ),
        samples=[asdict(seen)],
        figures=[summary, *(Text(problem, "red") for problem in seen.failed[:10])],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"length of the load (default {SECONDS:g})")
    found = shutil.which("redis-server")
    parser.add_argument("--server", type=Path, default=Path(found) if found else None, help="redis-server with TLS")
    harness.run("rotation", parser, measure)


if __name__ == "__main__":
    main()
