"""The bytes of a new version for a pod that holds the one before. See README.md in this folder."""

import argparse
import asyncio
import io
import itertools
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard
from bench import harness
from bench.chat import chat_client
from bench.harness import Line, Measurements, spread
from google.protobuf import json_format
from rich.table import Table

from updraft.registry.v1 import registry_pb2
from updraft_artifacts import delta, safetensors_header
from updraft_cli import output, results
from updraft_cli.demo.plan import SETTINGS
from updraft_cli.local.plan import StackConfig
from updraft_cli.local.stack import Stack
from updraft_cli.prompts import domain_prompts

SEED = 7
STREAMS = 4
DOMAINS = ("math", "code")  # the second half of the versions learns the other one, as in the demo
BAR = 0.5


def versions(registry: Path) -> list[registry_pb2.Version]:
    """All versions whose weights are in a registry's data folder, oldest first."""
    documents = []
    for path in registry.glob("versions/*/*.json"):
        document = json_format.Parse(path.read_text(), registry_pb2.Version(), ignore_unknown_fields=True)
        if document.version and blob(registry, document).exists():
            documents.append(document)
    return sorted(documents, key=lambda document: document.version)


def blob(registry: Path, version: registry_pb2.Version) -> Path:
    return registry / "blobs" / "sha256" / version.manifest.digest.removeprefix("sha256:")


async def serve_until(stack: Stack, registry: Path, *, num_versions: int, minutes: float) -> None:
    """Keep all streams busy until the trainer has published so many versions, or the time is over."""
    end = time.monotonic() + 60 * minutes
    prompts = {domain: itertools.cycle(domain_prompts(domain, 100, seed=SEED)) for domain in DOMAINS}
    async with chat_client(stack.addresses.inference_url) as client:

        async def stream() -> None:
            while len(versions(registry)) < num_versions and time.monotonic() < end:
                domain = DOMAINS[len(versions(registry)) >= num_versions / 2]
                await client.complete(next(prompts[domain]), 96, ignore_eos=False)

        await asyncio.gather(*(stream() for _ in range(STREAMS)))


@contextmanager
def published(arguments: argparse.Namespace) -> Iterator[Path]:
    """The data folder of a registry with a trainer's versions, of an earlier run or of one that runs now."""
    if arguments.registry:
        yield arguments.registry
        return
    with tempfile.TemporaryDirectory() as folder:
        config = StackConfig(
            model=harness.model(), data=Path(folder), port=0, registry_port=0, slots=2 * STREAMS, settings=SETTINGS
        )
        registry = Path(folder) / "registry"
        with Stack(config) as stack:
            asyncio.run(serve_until(stack, registry, num_versions=arguments.versions, minutes=arguments.minutes))
        yield registry


def measure_pair(registry: Path, base: registry_pb2.Version, result: registry_pb2.Version) -> dict[str, Any]:
    """Encode, decode and compare. Sizes are shares of the weights file."""
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
    """Bytes of the bf16 tensors that changed, and the entropy of their differences in bits: of order 0, and if the base's
    exponents are given."""
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
    file.seek(place.begin)
    return np.frombuffer(file.read(place.end - place.begin), np.uint16)


def ordered(values: npt.NDArray[np.uint16]) -> npt.NDArray[np.int32]:
    """Floating-point words as integers in the order of their values."""
    magnitude = (values & 0x7FFF).astype(np.int32)
    return np.where(values >> 15, -magnitude, magnitude)


def bits(values: npt.NDArray[np.int32]) -> float:
    """Entropy of all values by their frequencies, in bits."""
    _, counts = np.unique(values, return_counts=True)
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def pairs_table(samples: list[dict[str, Any]]) -> Table:
    """One row per pair; * if the base is not the parent."""
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
    return table


def measure(arguments: argparse.Namespace) -> Measurements:
    with published(arguments) as registry:
        samples = [measure_pair(registry, *pair) for pair in itertools.pairwise(versions(registry))]
    ratios = [row["delta"] for row in samples]
    return Measurements(
        seed=SEED,
        lines=(
            Line(results.at_most("delta to whole, worst pair", max(ratios, default=None), BAR, "x"), spread(ratios)),
            Line(results.at_least("consecutive versions compared", len(ratios), 3)),
        ),
        samples=samples,
        figures=[pairs_table(samples)],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--registry", type=Path, help="data folder of a registry; by default, run a stack and train")
    parser.add_argument("--versions", type=int, default=8, help="versions to wait for (default 8)")
    parser.add_argument("--minutes", type=float, default=12.0, help="longest time to wait (default 12)")
    harness.run("delta", parser, measure)


if __name__ == "__main__":
    main()
