"""`kubectl updraft attach`: what it asks for before it asks a cluster."""

import pytest
from click.testing import CliRunner

from updraft_cli.kubectl import plugin


def refused(*words: str) -> str:
    result = CliRunner().invoke(plugin, ["attach", *words])
    assert result.exit_code == 1
    return result.stderr


def test_a_patch_is_for_one_workload() -> None:
    assert "name the workload to attach to, for example: kubectl updraft attach chat deployment/vllm" in refused("chat")


@pytest.mark.parametrize("form", ["llmisvcconfig", "policy"])
def test_other_forms_are_for_all_workloads_that_ask_for_them(form: str) -> None:
    assert f"-o {form} is for all workloads that ask for it: leave TYPE/NAME out" in refused(
        "chat", "sts/a", "-o", form
    )
