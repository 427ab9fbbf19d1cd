"""A trainer beside a measurement."""

import subprocess
from types import SimpleNamespace
from typing import Any, cast

from bench.serving.beside import Trainer
from tests.support.ports import free_port


def test_a_trainer_that_has_died_has_made_no_step_and_hides_no_error() -> None:
    with subprocess.Popen(["sleep", "600"]) as process:
        metrics = {"trainer": f"http://127.0.0.1:{free_port()}/metrics"}
        stack = SimpleNamespace(child=lambda _: process, addresses=SimpleNamespace(metrics_urls=metrics))
        trainer = Trainer(cast("Any", stack))
        assert trainer.learnt().peak_bytes > 0
        process.kill()
    assert trainer.learnt().optimizer_steps is None
