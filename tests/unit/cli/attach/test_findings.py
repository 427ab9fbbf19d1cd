"""Findings from the answers of a server."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from updraft_cli.attach.findings import Answers, found
from updraft_cli.attach.needs import Needs
from updraft_tap.http import about
from updraft_tap.settings import DoorSettings
from updraft_vllm.http_process import HttpProcess

VLLM = Needs(engine="vllm", model="/model", folder=Path("/up"))
SGLANG = replace(VLLM, engine="sglang")
SERVER = {
    "model": "/model",
    "method": "eagle3",
    "steps": 3,
    "ranks": {"tensor": 1, "pipeline": 1, "data": 1},
    "device": "cpu",
    "eager": True,
}
PLUGIN = {
    "protocol": 5,
    "tap": "1.0",
    "engine": {"name": "vLLM", "version": "0.32.0"},
    "socket": "/up/tap.sock",
    "agent": True,
    "keys": False,
    "hooks": {"a": "", "b": ""},
    "server": SERVER,
}
WHOLE = Answers(version="0.32.0", is_speculating=True, plugin=PLUGIN, is_open=True)
INFO = {
    "version": "0.5.23",
    "speculative_algorithm": "EAGLE3",
    "speculative_num_steps": 3,
    "speculative_eagle_topk": 1,
    "speculative_num_draft_tokens": 4,
    "custom_weight_loader": ["updraft_sglang.weights.load"],
    "dp_size": 1,
    "pp_size": 1,
}


def lines(answers: Answers, needs: Needs = VLLM, **options: Any) -> list[str]:
    return [f"{one.problem}: {one.remedy}" for one in found(needs, answers, ours="1.0", **options)]


def plugged(**changes: Any) -> Answers:
    return replace(WHOLE, plugin={**PLUGIN, **changes})


def configured(**changes: Any) -> Answers:
    return plugged(server={**SERVER, **changes})


def sglang(*, is_there: bool = True, **changes: Any) -> Answers:
    """The answers of an SGLang server, whose agent `is_there`."""
    plugin = {**PLUGIN, "engine": {"name": "SGLang", "version": "0.5.23"}, "server": None, "agent": is_there}
    return Answers(version="0.5.23", is_speculating=False, plugin=plugin, info={**INFO, **changes})


def test_nothing_is_missing_where_everything_is_there() -> None:
    assert lines(WHOLE) == []


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        pytest.param(replace(WHOLE, version="0.31.9"), ["too old", "0.32.0 or later"], id="too old"),
        pytest.param(replace(WHOLE, version=None), ["does not answer as vLLM does"], id="no vLLM"),
        pytest.param(replace(WHOLE, is_refused=True), ["UPDRAFT_API_KEY"], id="needs a key"),
        pytest.param(replace(WHOLE, version=None, is_refused=True), ["UPDRAFT_API_KEY"], id="needs a key for all"),
        pytest.param(plugged(socket=""), ["UPDRAFT_VLLM_SOCKET=/up/tap.sock"], id="no socket"),
        pytest.param(plugged(agent=False), ["/up/tap.sock", "updraft-inference --engine vllm"], id="no agent"),
        pytest.param(plugged(tap="0.9"), ["version 0.9", "version 1.0", "prepare-vllm"], id="another version"),
        pytest.param(plugged(hooks=7), ["an unknown version", "prepare-vllm"], id="an answer of another form"),
        pytest.param(plugged(hooks={"f": "f takes x"}), ["f takes x", "use vLLM 0.32.0"], id="a hook does not fit"),
        pytest.param(
            configured(method="", unsupported="no eagle3"),
            ["does not speculate", "--speculative-config"],
            id="no speculation",
        ),
        pytest.param(configured(method="ngram"), ["with ngram", '"method": "eagle3"'], id="another algorithm"),
        pytest.param(configured(steps=0), ["drafts no tokens", '"num_speculative_tokens": 3'], id="k"),
        pytest.param(configured(eager=False), ["--enforce-eager"], id="compiled on a CPU"),
        pytest.param(
            configured(ranks={"tensor": 2, "pipeline": 2}, unsupported="pipeline parallelism is 2"),
            ["--pipeline-parallel-size to 1"],
            id="pipeline parallel",
        ),
        pytest.param(
            configured(unsupported="this server uses ray"), ["uses ray", "--distributed-executor-backend mp"], id="Ray"
        ),
    ],
)
def test_each_thing_that_is_missing_is_told_with_what_to_add(answers: Answers, expected: list[str]) -> None:
    (line,) = lines(answers)

    assert all(part in line for part in expected), line


def test_without_the_plugin_the_servers_own_counters_show_whether_it_speculates() -> None:
    (plugin,) = lines(replace(WHOLE, plugin=None))
    both = lines(replace(WHOLE, plugin=None, is_speculating=False))

    assert "PYTHONPATH=/up/plugin UPDRAFT_VLLM_SOCKET=/up/tap.sock" in plugin
    assert both[0] == plugin
    assert '--speculative-config \'{"method": "eagle3"' in both[1]


def test_an_open_server_lacks_keys_only_if_they_are_wanted() -> None:
    (line,) = lines(WHOLE, needs_keys=True)

    assert "UPDRAFT_VLLM_API_KEYS_FILE" in line
    assert lines(replace(WHOLE, is_open=False), needs_keys=True) == []


def test_a_compiled_server_on_a_gpu_lacks_nothing() -> None:
    assert lines(configured(eager=False, device="cuda")) == []


def test_several_tensor_parallel_ranks_of_vllm_lack_nothing() -> None:
    assert lines(configured(ranks={"tensor": 4, "pipeline": 1, "data": 1})) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"speculative_algorithm": None}, "--speculative-algorithm EAGLE3"),
        ({"speculative_algorithm": "EAGLE"}, "--speculative-algorithm EAGLE3"),
        ({"speculative_eagle_topk": 4}, "--speculative-eagle-topk 1"),
        ({"speculative_num_draft_tokens": 8}, "--speculative-num-draft-tokens 4"),
        ({"custom_weight_loader": None}, None),
        ({"dp_size": 2}, "--dp-size 1"),
        ({"pp_size": 2}, "--pp-size 1"),
    ],
)
def test_sglangs_own_configuration_says_which_argument_is_missing(
    changes: dict[str, Any], expected: str | None
) -> None:
    told = lines(sglang(**changes), SGLANG)

    assert [expected in line for line in told if expected] == ([True] if expected else [])


RANKS: dict[str, Any] = {"tp_size": 2, "admin_api_key": "***"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"custom_weight_loader": None}, "--custom-weight-loader updraft_sglang.weights.load"),
        (
            {"admin_api_key": None},
            "--admin-key-file /up/admin-key.yaml` and add the arguments --config /up/admin-key.yaml",
        ),
        ({"tp_size": 4}, "check again with --tensor-parallel-size 4"),
    ],
)
def test_several_ranks_need_a_loader_an_admin_key_and_an_agent_with_an_address(
    changes: dict[str, Any], expected: str | None
) -> None:
    told = lines(sglang(**{**RANKS, **changes}), replace(SGLANG, num_ranks=2))

    assert [expected in line for line in told if expected] == ([True] if expected else [])
    assert len(told) == (1 if expected else 0)


def test_the_agent_of_several_ranks_is_told_with_its_address_until_the_user_says_that_they_are_known() -> None:
    (unconfirmed,) = lines(sglang(**RANKS), replace(SGLANG, url="http://gpu:30000"))
    (no_agent,) = lines(sglang(is_there=False, **RANKS), replace(SGLANG, num_ranks=2))

    assert "to swap the drafts of 2 tensor-parallel ranks, the agent needs --attach" in unconfirmed
    assert unconfirmed.endswith("updraft-inference --engine sglang --attach http://gpu:30000")
    assert no_agent.endswith("updraft-inference --engine sglang --attach http://127.0.0.1:30000")


@given(st.dictionaries(st.sampled_from(sorted(PLUGIN)), st.none() | st.integers() | st.text(max_size=4)))
def test_an_answer_that_is_no_plugins_is_told(answer: dict[str, Any]) -> None:
    (line,) = lines(replace(WHOLE, plugin=answer))

    assert "an unknown version" in line


def test_the_plugin_answers_in_the_form_that_is_read(tmp_path: Path) -> None:
    said = HttpProcess(DoorSettings(), str(tmp_path / "none")).facts()

    (line,) = (line for line in lines(replace(WHOLE, plugin=said)) if "prepare" not in line)

    assert "no agent listens" in line
    assert about.PATH == "/v1/updraft/plugin"
