"""Memory limits of the inference process depend on its engine."""

import pytest
from tests.support.freed import kept_bytes


@pytest.mark.parametrize(("engine", "are_kept"), [("torch", True), ("vllm", False)])
def test_the_torch_engine_keeps_the_memory_of_its_steps_and_an_agent_gives_it_back(
    engine: str, *, are_kept: bool
) -> None:
    kept = kept_bytes(f"from updraft_inference.process import limit_memory; limit_memory({engine!r})")
    assert (kept > 100_000_000) == are_kept
