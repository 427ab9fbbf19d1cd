from pathlib import Path

from updraft_cli.demo.frozen import frozen_process
from updraft_cli.local.data_folder import DataFolder
from updraft_cli.local.plan import StackConfig, addresses, stages


def test_the_frozen_process_is_like_the_stacks_but_never_swaps_and_never_captures(tmp_path: Path) -> None:
    config = StackConfig(
        data=tmp_path,
        model=Path("/m"),
        model_name="SmolLM2",
        port=0,
        registry_port=0,
        slots=8,
        threads=1,
        settings={"UPDRAFT_INFERENCE_LOOKAHEAD": "3", "UPDRAFT_INFERENCE_REDIS_URL": "redis://elsewhere"},
    )
    folder = DataFolder(tmp_path)
    *_, (_, serving) = stages(config, addresses(config, folder), folder, {})
    process = frozen_process(serving, Path("/drafts/7"), Path("/frozen"))
    prefix = "UPDRAFT_INFERENCE_"
    ours = {name.removeprefix(prefix): value for name, value in process.environment.items() if name.startswith(prefix)}
    assert ours["DRAFT_PATH"] == "/drafts/7"
    assert (ours["REGISTRY_ADDRESS"], ours["REDIS_URL"]) == ("", "")
    assert (ours["NUM_THREADS"], ours["NUM_SLOTS"], ours["LOOKAHEAD"]) == ("1", "8", "3")
    assert process.address == f"http://127.0.0.1:{ours['PORT']}" != serving.address
