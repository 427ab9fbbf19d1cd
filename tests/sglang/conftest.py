"""Every test of this folder needs the real server: it is marked `sglang`, has time for a start, and is skipped unbuilt."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.sglang import build, models
from tests.sglang.server import START_S, Server, eagle3

from updraft_draft import checkpoint

_HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "sglang: starts a real SGLang server")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _HERE not in item.path.parents:
            continue
        item.add_marker(pytest.mark.sglang)
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(START_S + 300))
        if not build.is_built():
            item.add_marker(pytest.mark.skip(reason="SGLang's environment is not built; run `make sglang-build`"))


@dataclass(frozen=True, slots=True, kw_only=True)
class CycleModels:
    """The cycle target, and drafts of one vocabulary, by how many of their proposals are right: all, half of them, none."""

    target: Path
    good: Path
    half: Path
    bad: Path


@pytest.fixture(scope="session")
def cycle(tmp_path_factory: pytest.TempPathFactory) -> CycleModels:
    folder = tmp_path_factory.mktemp("cycle")
    target = models.write_cycle_target(folder / "target")
    for name, quality in (("good", 1.0), ("half", 0.5), ("bad", 0.0)):
        checkpoint.save(models.cycle_draft(target, quality=quality), folder / name)
    return CycleModels(target=target, good=folder / "good", half=folder / "half", bad=folder / "bad")


@pytest.fixture(scope="module")
def server(cycle: CycleModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """SGLang without any plugin of ours, on the cycle target with its `half` draft: one for a file, and one at a time."""
    log = tmp_path_factory.mktemp("sglang") / "server.log"
    with Server(cycle.target, log, arguments=[*eagle3(cycle.half), "--enable-metrics"]) as running:
        yield running
