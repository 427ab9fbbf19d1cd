"""What Updraft relies on in a stock SGLang, asked of the real one without our plugin: an upgrade breaks it here first."""

import base64
import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from tests.sglang import build, models
from tests.sglang.conftest import CycleModels
from tests.sglang.server import Server
from torch import Tensor

from updraft_cli.__main__ import cli
from updraft_sglang import names

pytestmark = pytest.mark.lasts(120)

_NUM_TOKENS = 200

_SIGNATURES = """
import importlib, inspect, json, pkgutil, sys
print(json.dumps([list(inspect.signature(pkgutil.resolve_name(name)).parameters) for name in sys.argv[1:]]))
"""


def generate(server: Server, prompt: str, *, extra_key: str | None = None, **sampling: Any) -> dict[str, Any]:
    params = {"temperature": 0, **sampling}
    answer: dict[str, Any] = server.post("/generate", text=prompt, sampling_params=params, extra_key=extra_key)
    return answer


@contextmanager
def streamed(
    server: Server, prompt: str, num_tokens: int, *, rid: str | None = None
) -> Iterator[Iterator[dict[str, Any]]]:
    """The events of a request under way, its first one read already.

    A name must not come twice: who hangs up is noticed seconds later, and what has that name then is ended.
    """
    sampling = {"temperature": 0, "max_new_tokens": num_tokens}
    body = {"text": prompt, "sampling_params": sampling, "stream": True, "rid": rid}
    with server.http.stream("POST", "/generate", json=body) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: {"))
        events = (json.loads(line.removeprefix("data: ")) for line in lines)
        next(events)
        yield events


@contextmanager
def paused(server: Server) -> Iterator[None]:
    server.post("/pause_generation", mode="in_place")
    try:
        yield
    finally:
        server.post("/continue_generation")


def swap(server: Server, draft: Path, version: str) -> None:
    with paused(server):
        server.post("/begin_weight_update", selector="draft")
        assert update(server, draft, version)["success"]
        server.post("/end_weight_update")


def update(server: Server, draft: Path, version: str) -> dict[str, Any]:
    """The stock loader, which takes tensors; on success or refusal SGLang says `success`."""
    packed = base64.b64encode(pickle.dumps(list(trained(draft).items()))).decode()
    body = {"selector": "draft", "flush_cache": False, "weight_version": version, "load_format": None}
    response = server.http.post("/update_weights_from_tensor", json={"serialized_named_tensors": [packed], **body})
    said: dict[str, Any] = response.json()
    return said


def trained(draft: Path) -> dict[str, Tensor]:
    return {
        name: tensor for name, tensor in load_file(draft / "model.safetensors").items() if name not in ("d2t", "t2d")
    }


def served(server: Server, selector: str) -> dict[str, str]:
    (rank,) = server.post("/weights_checker", action="checksum", selector=selector)["ranks"]
    place = rank["parallelism_info"][0]
    assert (place["tp_rank"], place["tp_size"]) == (0, 1)
    checksums: dict[str, str] = rank["checksums"]
    return checksums


def expected(draft: Path) -> dict[str, str]:
    """On a CPU: the head of SHA-256 of what SGLang makes of the checkpoint, in float32."""
    weights = {name.replace("midlayer", "layers.0"): tensor.float() for name, tensor in trained(draft).items()}
    for whole, parts in {
        "self_attn.qkv": "self_attn.q self_attn.k self_attn.v",
        "mlp.gate_up": "mlp.gate mlp.up",
    }.items():
        rows = [weights.pop(f"layers.0.{part}_proj.weight") for part in parts.split()]
        weights[f"layers.0.{whole}_proj.weight"] = torch.cat(rows)
    names = {name: name if name.startswith("lm_head") else f"model.{name}" for name in weights}
    return {
        f"draft.{names[name]}": hashlib.sha256(tensor.contiguous().numpy().data).hexdigest()[:16]
        for name, tensor in weights.items()
    }


def test_the_server_says_what_it_is(server: Server, cycle: CycleModels) -> None:
    said, model = server.http.get("/server_info").json(), server.http.get("/model_info").json()
    assert said["version"] == "0.5.23"
    assert said["device"].startswith("cpu")
    assert [said[f"{kind}_size"] for kind in ("tp", "dp", "pp")] == [1, 1, 1]
    assert (said["max_running_requests"], said["dtype"]) == (16, "float32")
    assert (said["speculative_algorithm"], said["speculative_draft_model_path"]) == ("EAGLE3", str(cycle.half))
    assert (said["speculative_num_steps"], said["speculative_num_draft_tokens"], said["speculative_eagle_topk"]) == (
        3,
        4,
        1,
    )
    assert isinstance(said["max_req_input_len"], int)
    assert said.keys() >= {"speculative_adaptive", "custom_weight_loader", "internal_states"}
    assert model["model_path"] == str(cycle.target)


def test_each_request_has_its_own_exact_sums(server: Server, cycle: CycleModels) -> None:
    swap(server, cycle.good, "v1")
    answer = generate(server, "a", max_new_tokens=65)
    meta = answer["meta_info"]
    assert answer["output_ids"] == models.continuation("a", 65)
    assert (meta["completion_tokens"], meta["finish_reason"]["type"]) == (65, "length")
    assert (meta["spec_verify_ct"], meta["spec_correct_drafts_histogram"]) == (16, [0, 0, 0, 16])
    assert (meta["spec_num_correct_drafts"], meta["spec_num_proposed_drafts"]) == (48, 48)

    swap(server, cycle.bad, "v2")
    meta = generate(server, "a", max_new_tokens=65)["meta_info"]
    assert (meta["spec_verify_ct"], meta["spec_num_correct_drafts"]) == (64, 0)
    assert sum(meta["spec_correct_drafts_histogram"]) == meta["spec_correct_drafts_histogram"][0] == 64


def test_the_next_request_with_the_same_beginning_takes_it_from_the_cache(server: Server) -> None:
    beginning = "Quite a beginning that two requests have in common"
    cold = generate(server, beginning + "!", max_new_tokens=4)
    warm = generate(server, beginning + "?", max_new_tokens=4)
    # With EAGLE the cache knows pairs of tokens, so the last common one is not taken from it.
    assert (cold["meta_info"]["cached_tokens"], warm["meta_info"]["cached_tokens"]) == (0, len(beginning) - 1)
    assert warm["output_ids"] == models.continuation("?", 4)


def test_a_request_with_another_extra_key_takes_nothing_from_the_cache(server: Server) -> None:
    beginning = "A beginning that requests of two clients have in common"
    found = [
        generate(server, beginning + end, max_new_tokens=4, extra_key=key)["meta_info"]["cached_tokens"]
        for end, key in (("!", "one"), ("?", "other"), (".", None), (";", "one"))
    ]
    assert found == [0, 0, 0, len(beginning) - 1]


def test_a_draft_changes_within_a_request_and_the_text_does_not(server: Server, cycle: CycleModels) -> None:
    swap(server, cycle.bad, "v3")
    target = served(server, "target")
    with streamed(server, "b", _NUM_TOKENS) as events:
        swap(server, cycle.good, "v4")
        *_, last = events
    assert last["output_ids"] == models.continuation("b", _NUM_TOKENS)
    spans = last["meta_info"]["weight_versions"]
    assert [span["version"] for span in spans] == ["v3", "v4"]
    assert (spans[0]["start"], spans[-1]["end"]) == (0, _NUM_TOKENS)
    assert all(before["end"] == after["start"] for before, after in pairwise(spans))
    assert served(server, "target") == target


def test_the_checksums_of_a_draft_follow_from_its_file(server: Server, cycle: CycleModels) -> None:
    swap(server, cycle.half, "v5")
    assert served(server, "draft").items() >= expected(cycle.half).items()
    assert served(server, "draft").keys() - expected(cycle.half).keys() == {"draft.model.embed_tokens.weight"}
    assert not served(server, "draft").items() >= expected(cycle.good).items()


def test_weights_come_within_a_session_only_and_there_is_one_at_a_time(server: Server, cycle: CycleModels) -> None:
    before = served(server, "draft")
    assert not update(server, cycle.bad, "stray")["success"]
    server.post("/begin_weight_update", selector="draft")
    try:
        second = server.http.post("/begin_weight_update", json={"selector": "draft"})
        assert not (second.is_success and second.json()["success"])
    finally:
        server.post("/end_weight_update")
    assert served(server, "draft") == before


def test_a_paused_server_lives_takes_nothing_in_and_goes_on_where_it_was(server: Server) -> None:
    with streamed(server, "c", _NUM_TOKENS) as events:
        with paused(server):
            assert server.http.get("/ping").status_code == 200
            assert server.http.get("/ready").status_code == 503
        assert server.http.get("/ready").status_code == 200
        *_, last = events
    assert last["output_ids"] == models.continuation("c", _NUM_TOKENS)


def test_a_request_is_ended_by_its_name(server: Server) -> None:
    with streamed(server, "d", 900, rid="to be ended") as events:
        server.post("/abort_request", rid="to be ended")
        *_, last = events
    assert last["meta_info"]["finish_reason"]["type"] == "abort"
    assert last["meta_info"]["completion_tokens"] < 900


def test_what_is_too_long_is_refused_with_a_sentence(server: Server) -> None:
    refused = server.http.post("/generate", json={"input_ids": [97] * 5000, "sampling_params": {"max_new_tokens": 1}})
    assert refused.status_code == 400
    assert "longer" in refused.json()["error"]["message"]


def test_figures_have_the_names_that_we_read(server: Server) -> None:
    names = {line.partition("{")[0] for line in server.http.get("/metrics").text.splitlines() if line[:1] != "#"}
    assert names >= {"sglang:spec_accept_length", "sglang:spec_accept_rate", "sglang:spec_verify_calls_total"}


def test_the_plugin_finds_what_it_hooks_into() -> None:
    expected_parameters = {
        names.START: ["self", "server_args"],
        names.FORWARD: ["self", "batch"],
        names.VERIFY: ["verify_input", "batch", "logits_output"],
        names.VERIFY_AS_CALLED: ["verify_input", "batch", "logits_output"],
        names.PREFILL: ["self", "logits_output", "forward_batch"],
        names.UPDATE: ["self", "named_tensors", "load_format"],
        names.CHECK: ["self", "recv_req"],
        names.RECEIVE: ["self", "local_reqs"],
    }
    result = subprocess.run(
        [build.python(), "-W", "ignore", "-c", _SIGNATURES, *expected_parameters],
        env={**os.environ, "SGLANG_USE_CPU_ENGINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=sys.stderr,
        text=True,
        check=True,
    )
    found = json.loads(result.stdout.splitlines()[-1])
    for parameters, beginning in zip(found, expected_parameters.values(), strict=True):
        assert parameters[: len(beginning)] == beginning


def test_the_check_of_a_server_without_the_plugin_names_that_and_nothing_else(server: Server) -> None:
    done = CliRunner(env={"UPDRAFT_API_KEY": None}).invoke(cli, ["attach", "--engine", "sglang", "--check", server.url])
    first, *lines = done.output.splitlines()

    assert (done.exit_code, first) == (1, f"SGLang 0.5.23 at {server.url}")
    assert [line for line in lines if line.startswith("missing")] == ["missing: Updraft's plugin is not loaded"]
