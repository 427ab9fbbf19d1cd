"""How many bytes does a new version cost a pod that holds the one before? See README.md beside this file."""

import argparse
import asyncio
import io
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import zstandard
from google.protobuf import json_format
from rich.console import Console

from updraft.registry.v1 import registry_pb2
from updraft_artifacts import delta, safetensors_header
from updraft_cli import output, results
from updraft_cli.demo.plan import SETTINGS
from updraft_cli.local.folders import cache_folder
from updraft_cli.local.plan import StackConfig
from updraft_cli.local.stack import Stack
from updraft_cli.models.smollm2 import model_folder
from updraft_cli.prompts import domain_prompts

SEED = 7
STREAMS = 4
DOMAINS = ("math", "code")  # the second half of the versions learns something else, as in the demo
BAR = 0.5


def versions(registry: Path) -> list[registry_pb2.Version]:
    """All versions whose weights are in a registry's data folder, oldest first."""
    found = []
    for path in registry.glob("versions/*/*.json"):
        document = json_format.Parse(path.read_text(), registry_pb2.Version(), ignore_unknown_fields=True)
        if document.version and blob(registry, document).exists():
            found.append(document)
    return sorted(found, key=lambda document: document.version)


def blob(registry: Path, version: registry_pb2.Version) -> Path:
    """Where the weights are."""
    return registry / "blobs" / "sha256" / version.manifest.digest.removeprefix("sha256:")


async def serve_until(stack: Stack, registry: Path, *, num_versions: int, minutes: float) -> None:
    """Keep all streams busy until so many versions were published, or the time is over."""
    end = time.monotonic() + 60 * minutes
    prompts = {domain: itertools.cycle(domain_prompts(domain, 100, seed=SEED)) for domain in DOMAINS}

    def is_over() -> bool:
        return len(versions(registry)) >= num_versions or time.monotonic() > end

    async with httpx.AsyncClient(base_url=stack.addresses.inference_url, timeout=600) as client:
        model = (await client.get("/v1/models")).raise_for_status().json()["data"][0]["id"]

        async def stream() -> None:
            while not is_over():
                domain = DOMAINS[len(versions(registry)) >= num_versions / 2]
                messages = [{"role": "user", "content": next(prompts[domain])}]
                body = {"model": model, "messages": messages, "max_tokens": 96, "temperature": 0}
                (await client.post("/v1/chat/completions", json=body)).raise_for_status()

        await asyncio.gather(*(stream() for _ in range(STREAMS)))


@contextmanager
def published(arguments: argparse.Namespace) -> Iterator[Path]:
    """The data folder of a registry with versions of a trainer: of an earlier run, or of one that runs now."""
    if arguments.registry:
        yield arguments.registry
        return
    with tempfile.TemporaryDirectory() as folder:
        config = StackConfig(
            model=model_folder(cache_folder(os.environ)),
            data=Path(folder),
            port=0,
            registry_port=0,
            slots=2 * STREAMS,
            settings=SETTINGS,
        )
        registry = Path(folder) / "registry"
        with Stack(config) as stack:
            asyncio.run(serve_until(stack, registry, num_versions=arguments.versions, minutes=arguments.minutes))
        yield registry


def measure(registry: Path, base: registry_pb2.Version, result: registry_pb2.Version) -> dict[str, Any]:
    """Encode, decode, compare; sizes as parts of the weights file's."""
    old, new, packed, again = blob(registry, base), blob(registry, result), io.BytesIO(), io.BytesIO()
    with old.open("rb") as before, new.open("rb") as after:
        started = time.perf_counter()
        header = delta.encode(before, after, packed)
        encoded = time.perf_counter()
        packed.seek(0)
        delta.decode(packed, before, again, header)
        decoded = time.perf_counter()
        changed, order0, given_exponent = entropy(before, after)
    assert again.getvalue() == new.read_bytes(), "the delta is not lossless"
    size = header.result_bytes
    return {
        "version": result.version,
        "base": base.version,
        "is_parent": result.manifest.parent_version == base.version,
        "steps": result.manifest.provenance.step - base.manifest.provenance.step,
        "bytes": size,
        "delta": len(packed.getvalue()) / size,
        "delta_of_changed": len(packed.getvalue()) / changed if changed else 0.0,
        "zstd_19": len(zstandard.compress(new.read_bytes(), 19)) / size,
        "entropy": order0 / 8 / size,
        "entropy_given_exponent": given_exponent / 8 / size,
        "encode_s": encoded - started,
        "decode_s": decoded - encoded,
    }


def entropy(before: Any, after: Any) -> tuple[int, float, float]:
    """Bytes of bf16 tensors that changed, and the bits of their differences: order 0, and given the base's exponent."""
    known = {place.name: place for place in safetensors_header.read(before)}
    changed, order0, given_exponent = 0, 0.0, 0.0
    for place in safetensors_header.read(after):
        if place.dtype == "BF16" and place.name in known:
            old, new = words(before, known[place.name]), words(after, place)
            if len(old) != len(new) or np.array_equal(old, new):
                continue
            difference = ordered(new) - ordered(old)
            exponent = (old >> 7) & 0xFF
            changed += 2 * len(new)
            order0 += bits(difference)
            given_exponent += sum(bits(difference[exponent == value]) for value in np.unique(exponent))
    return changed, order0, given_exponent


def words(file: Any, place: safetensors_header.TensorSpan) -> npt.NDArray[np.uint16]:
    """The words of a tensor."""
    file.seek(place.begin)
    return np.frombuffer(file.read(place.end - place.begin), np.uint16)


def ordered(values: npt.NDArray[np.uint16]) -> npt.NDArray[np.int32]:
    """Floating-point words as integers in the order of their values."""
    magnitude = (values & 0x7FFF).astype(np.int32)
    return np.where(values >> 15, -magnitude, magnitude)


def bits(values: npt.NDArray[np.int32]) -> float:
    """What the least code takes that knows how often each value occurs."""
    _, counts = np.unique(values, return_counts=True)
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def show(console: Console, samples: list[dict[str, Any]]) -> None:
    """One row a pair; * if the base is not the parent."""
    table = output.table("pair", ">steps", ">MB", ">delta", ">changed", ">entropy", ">by exponent", ">zstd", ">s")
    for row in samples:
        table.add_row(
            f"{row['base']} > {row['version']}{'' if row['is_parent'] else ' *'}",
            str(row["steps"]),
            f"{row['bytes'] / 1e6:.1f}",
            *(
                f"{row[name]:.3f}"
                for name in ("delta", "delta_of_changed", "entropy", "entropy_given_exponent", "zstd_19")
            ),
            f"{row['encode_s']:.1f}+{row['decode_s']:.1f}",
        )
    console.print(table)


def main() -> None:
    """Measure, print one table, write bench/results/; exit 1 where a bar is missed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--registry", type=Path, help="data folder of a registry; without: run a stack and train")
    parser.add_argument("--versions", type=int, default=8, help="versions to wait for (default 8)")
    parser.add_argument("--minutes", type=float, default=12.0, help="but no longer than this (default 12)")
    arguments = parser.parse_args()
    started, console = datetime.now(UTC), Console()
    with published(arguments) as registry:
        samples = [measure(registry, *pair) for pair in itertools.pairwise(versions(registry))]
    ratios = [row["delta"] for row in samples]
    result = results.Result(
        name="delta",
        command="make bench-delta",
        started=started,
        commit=results.commit(),
        seed=SEED,
        machine=results.machine(),
        bars=(
            results.at_most("delta to whole, worst pair", max(ratios, default=None), BAR, "x"),
            results.at_least("consecutive versions compared", len(ratios), 3),
        ),
        samples=samples,
    )
    show(console, samples)
    results.show_bars(console, result.bars)
    console.print(results.write(result, Path("bench/results")))
    sys.exit(results.missed(result.bars))


if __name__ == "__main__":
    main()
