"""A real SGLang that is started and ended with the process."""

import asyncio
import os
import shutil
import signal
from pathlib import Path

import psutil
import pytest
from tests.contract.engine_contract import NUM_SLOTS, asking, whole
from tests.sglang import build
from tests.sglang.models import draft_vocabulary, write_random_target
from tests.support.tiny_target import DRAFT_VOCAB, make_draft, save_draft
from tests.support.wait import until

from updraft_artifacts.draft_shape import ShapeChoice
from updraft_chassis.errors import Unavailable
from updraft_inference.engine import (
    DraftCheckpoint,
    FinishedRequest,
)
from updraft_inference.sglang_engine import launcher
from updraft_inference.sglang_engine.engine import SglangOptions

pytestmark = [pytest.mark.timeout(900), pytest.mark.lasts(240)]

ADMIN = "the admin key"
NUM_STEPS = 2
CONTEXT = 128


@pytest.fixture
def heard() -> list[FinishedRequest]:
    return []


@pytest.fixture
def plan(tmp_path: Path) -> launcher.LaunchOptions:
    cpu = "--device cpu --attention-backend intel_amx --disable-cuda-graph --mem-fraction-static 0.2"
    return launcher.LaunchOptions(
        python=build.python(),
        folder=tmp_path / "sglang",
        num_steps=NUM_STEPS,
        num_slots=NUM_SLOTS,
        max_context=CONTEXT,
        dtype="float32",
        shape=ShapeChoice(draft_vocab_size=DRAFT_VOCAB),
        extra=f"{cpu} --max-total-tokens 4096",
        admin_key=ADMIN,
        may_restart=True,
        drain_s=30.0,
    )


async def test_it_serves_drains_starts_anew_and_ends(
    plan: launcher.LaunchOptions, tmp_path: Path, short_tmp_path: Path, heard: list[FinishedRequest]
) -> None:
    target = write_random_target(tmp_path / "target")
    options = SglangOptions(model=target, socket=short_tmp_path / "s", note=tmp_path / "swap", max_context=CONTEXT)
    environ = os.environ | {
        "SGLANG_USE_CPU_ENGINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "UPDRAFT_INFERENCE_REDIS_URL": "redis://:secret@nowhere",
    }
    async with launcher.started(plan, options, environ, heard.append, lambda: False) as engine:
        (process,) = [each for each in psutil.Process().children() if "sglang" in " ".join(each.cmdline())]
        assert "UPDRAFT_INFERENCE_REDIS_URL" not in process.environ()
        assert engine.info.max_context == CONTEXT
        first, _ = await whole(engine, asking("a", num_prompt=100, max_tokens=28))
        assert len(first) == 28

        ids = draft_vocabulary(target)[:-1]
        folder = tmp_path / "7"
        other = DraftCheckpoint(
            version=7, folder=folder, tensors_digest=save_draft(make_draft(target, token_ids=ids), folder)
        )
        running = engine.generate(asking("b", max_tokens=60))
        tokens = list((await anext(running)).token_ids)
        async with asyncio.TaskGroup() as tasks:
            swap = tasks.create_task(engine.swap(other))
            async for delta in running:
                tokens += delta.token_ids
            assert len(tokens) == 60, "what ran when the server was told to stop has ended"

        assert swap.result().loaded.version == 7
        again, finished = await whole(engine, asking("c", num_prompt=100, max_tokens=28))
        assert again == first
        assert {step.draft_version for step in finished.steps} == {7}

        shutil.rmtree(folder)  # as old versions go
        assert (await engine.swap(None)).loaded.version == 0
        assert (await whole(engine, asking("d", num_prompt=100, max_tokens=28)))[0] == first
        (process,) = [each for each in psutil.Process().children() if "sglang" in " ".join(each.cmdline())]
        family = [process, *process.children(recursive=True)]
    assert not psutil.wait_procs(family, timeout=30)[1], "nothing is left of it"


async def test_a_scheduler_that_is_killed_ends_the_engine(
    plan: launcher.LaunchOptions, tmp_path: Path, short_tmp_path: Path, heard: list[FinishedRequest]
) -> None:
    target = write_random_target(tmp_path / "target")
    options = SglangOptions(model=target, socket=short_tmp_path / "s", note=tmp_path / "swap")
    environ = os.environ | {"SGLANG_USE_CPU_ENGINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    async with launcher.started(plan, options, environ, heard.append, lambda: False) as engine:
        (process,) = [each for each in psutil.Process().children() if "sglang" in " ".join(each.cmdline())]
        (scheduler,) = [each for each in process.children(recursive=True) if "scheduler" in " ".join(each.cmdline())]
        running = engine.generate(asking("a", max_tokens=100))
        await anext(running)
        scheduler.send_signal(signal.SIGKILL)

        with pytest.raises(Unavailable):
            async for _ in running:
                pass
        await until(lambda: not engine.is_alive, what="the end of the engine")
