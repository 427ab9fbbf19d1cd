"""The lines that `updraft attach` prints, which a person pastes into a shell."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from updraft_cli.attach.needs import SGLANG_LOADER, EngineName, Needs
from updraft_inference.launch import sglang_arguments, vllm_arguments
from updraft_inference.settings import InferenceSettings
from updraft_inference.tap.server_kind import SGLANG, VLLM, ServerKind
from updraft_sglang.weights import LOADER

FOLDER = Path("/with space/up")


def needs(engine: EngineName = "vllm", model: str = "/a model") -> Needs:
    return Needs(engine=engine, model=model, folder=FOLDER, num_steps=2)


def test_the_arguments_are_those_of_a_server_that_updraft_starts() -> None:
    draft = FOLDER / "draft"

    assert shlex.split(needs().arguments) == vllm_arguments.speculation(draft, 2)
    assert shlex.split(needs("sglang").arguments) == sglang_arguments.speculation(draft, 2)


@pytest.mark.parametrize(("engine", "started"), [("vllm", VLLM), ("sglang", SGLANG)])
def test_the_variables_are_those_of_a_server_that_updraft_starts(engine: EngineName, started: ServerKind) -> None:
    words = dict(word.split("=", 1) for word in shlex.split(needs(engine).environment))

    assert words == {"PYTHONPATH": "/with space/up/plugin", started.socket_variable: "/with space/up/tap.sock"}


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_every_setting_of_the_agent_exists_and_a_space_splits_none(engine: EngineName) -> None:
    *words, command, _, _ = shlex.split(needs(engine).sidecar)
    names = [word.partition("=")[0].removeprefix("UPDRAFT_INFERENCE_").lower() for word in words]

    assert command == "updraft-inference"
    assert set(names) <= set(InferenceSettings.model_fields)
    assert "UPDRAFT_INFERENCE_MODEL=/a model" in words


def test_several_ranks_share_an_admin_key_that_is_in_a_file_and_the_agent_knows_their_address() -> None:
    several = replace(needs("sglang"), num_ranks=2, url="http://gpu:30000")
    prepare, server, agent = (shlex.split(line) for line in (several.prepare, several.arguments, several.sidecar))
    file = prepare[prepare.index("--admin-key-file") + 1]

    assert server[-4:] == ["--tp-size", "2", "--config", file]
    assert f"UPDRAFT_INFERENCE_SGLANG_ADMIN_KEY_FILE={file}" in agent
    assert agent[-5:] == ["updraft-inference", "--engine", "sglang", "--attach", "http://gpu:30000"]
    assert Path(file).suffix == ".yaml", "SGLang reads no other"


def test_the_loader_has_the_name_that_the_plugin_gives_it() -> None:
    assert SGLANG_LOADER == LOADER


def test_the_first_draft_is_written_where_the_server_reads_it() -> None:
    words = shlex.split(needs().prepare)

    assert words[0] == "UPDRAFT_INFERENCE_MODEL=/a model"
    assert words[-1] == json.loads(shlex.split(needs().arguments)[1])["model"]
