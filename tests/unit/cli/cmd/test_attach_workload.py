"""`kubectl updraft attach`: what it asks for before it asks a cluster."""

from click.testing import CliRunner

from updraft_cli.kubectl import plugin


def refused(*words: str) -> str:
    result = CliRunner().invoke(plugin, ["attach", *words])
    assert result.exit_code == 1
    return result.stderr


def test_a_patch_is_for_one_workload() -> None:
    assert "name the workload to attach to, for example: kubectl updraft attach chat deployment/vllm" in refused("chat")


def test_a_kserve_config_is_for_any_service() -> None:
    assert "leave TYPE/NAME out" in refused("chat", "deployment/vllm", "-o", "llmisvcconfig")
