from typing import Any

import torch
from tests.support.ranks import run_ranks
from tests.support.tiny_draft import CONFIG
from torch import Tensor

from updraft_trainer.commands import Command, CommandChannel, DraftTensors, End, Estimate, LoadLearner, SetBaseline
from updraft_trainer.coordination.ranks import Ranks


def received(ranks: Ranks, commands: list[Command]) -> list[Command]:
    """At rank 0 nothing; elsewhere what came."""
    channel, came = CommandChannel(ranks, torch.device("cpu")), list[Command]()
    if ranks.leads:
        for command in commands:
            channel.send(command)
        return []
    while not isinstance(command := channel.receive(), End):
        came.append(command)
    return came


def test_commands_come_in_order_with_all_tensors_that_they_contain() -> None:
    tensors: dict[str, Tensor] = {
        "bfloat16": torch.randn(3, 5).bfloat16(),
        "a part of another": torch.arange(12).view(3, 4)[:, 1],
        "bool": torch.tensor([True, False]),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(7.0),
    }
    moments: dict[str, Any] = {
        "state": {0: {"exp_avg": torch.randn(2, 2), "step": torch.tensor(3.0)}},
        "param_groups": [{"lr": 0.1}],
    }
    sent: list[Command] = [
        LoadLearner(
            config=CONFIG,
            token_ids=torch.arange(16),
            learner={"network": tensors, "optimizer": moments, "step": 9},
            uses={"a": 2},
            counted=["a folder"],
        ),
        SetBaseline(0, None),
        Estimate(DraftTensors(config=CONFIG, tensors=tensors)),
        End(),
    ]
    of_leader, *of_others = run_ranks(received, sent, size=3)
    assert of_leader == []
    for load, baseline, estimate in of_others:
        assert baseline == SetBaseline(0, None)
        assert isinstance(load, LoadLearner)
        assert isinstance(estimate, Estimate)
        assert (load.config, load.uses, load.counted) == (CONFIG, {"a": 2}, ["a folder"])
        for name, tensor in tensors.items():
            for copy in (load.learner["network"][name], estimate.draft.tensors[name]):
                assert copy.dtype == tensor.dtype
                assert torch.equal(copy, tensor)
        came = load.learner["optimizer"]
        assert came["param_groups"] == [{"lr": 0.1}]
        assert torch.equal(came["state"][0]["exp_avg"], moments["state"][0]["exp_avg"])
