from pathlib import Path

from updraft_cli.demo.frozen import frozen_process
from updraft_cli.local.plan import StackConfig


def test_the_frozen_process_is_like_the_stacks_but_never_swaps_and_never_captures() -> None:
    config = StackConfig(
        data=Path("/d"),
        model=Path("/m"),
        model_name="SmolLM2",
        slots=8,
        threads=1,
        settings={"UPDRAFT_INFERENCE_LOOKAHEAD": "3", "UPDRAFT_INFERENCE_REDIS_URL": "redis://elsewhere"},
    )
    process = frozen_process(config, Path("/drafts/7"), Path("/frozen"), 1234)
    prefix = "UPDRAFT_INFERENCE_"
    ours = {name.removeprefix(prefix): value for name, value in process.environment.items() if name.startswith(prefix)}
    assert ours["DRAFT_PATH"] == "/drafts/7"
    assert (ours["REGISTRY_ADDRESS"], ours["REDIS_URL"]) == ("", "")
    assert (ours["NUM_THREADS"], ours["NUM_SLOTS"], ours["LOOKAHEAD"]) == ("1", "8", "3")
    assert process.address == "http://127.0.0.1:1234"
