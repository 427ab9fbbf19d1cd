"""Which ranks of SGLang are refused, on a stand-in for its own state of the ranks."""

from types import SimpleNamespace
from typing import Any

import pytest

from updraft_sglang import configuration, plugin
from updraft_tap.channel import Channel
from updraft_tap.settings import Settings

ONE = {"tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "dp_rank": None, "dp_size": 1, "attn_dp_size": 1}

REFUSED = [
    ({"tp_size": 2, "dp_rank": 0, "dp_size": 2, "attn_dp_size": 2}, "data-parallel attention (--enable-dp-attention)"),
    ({"dp_rank": 0, "dp_size": 2}, "2 replicas in one server (--dp-size): start one server per replica"),
    ({"pp_size": 2}, "pipeline parallelism (--pp-size), but it is 2"),
]


def run_with(monkeypatch: pytest.MonkeyPatch, **ranks: int) -> None:
    monkeypatch.setattr(configuration, "_parallel", lambda: SimpleNamespace(**{**ONE, **ranks}))


@pytest.mark.parametrize("ranks", [{}, {"tp_size": 2}])
def test_one_scheduler_with_all_requests_is_supported(monkeypatch: pytest.MonkeyPatch, ranks: dict[str, int]) -> None:
    run_with(monkeypatch, **ranks)

    assert configuration.is_sender()
    assert configuration.replicas() == ""


@pytest.mark.parametrize(("ranks", "reason"), REFUSED)
def test_of_ranks_that_are_refused_the_first_one_says_why_and_neither_counts_nor_captures(
    monkeypatch: pytest.MonkeyPatch, ranks: dict[str, int], reason: str
) -> None:
    run_with(monkeypatch, **ranks)
    monkeypatch.setattr(plugin, "share_vocabulary", lambda _: None)
    monkeypatch.setattr(Channel, "start", lambda _: None)
    monkeypatch.setattr("updraft_tap.hooks.states", lambda bindings: {one.target: "" for one in bindings})
    made = plugin.Plugin(Settings(socket="/nowhere"), {})

    made.start(lambda _: None, SimpleNamespace(draft_worker=None))

    problem = f"capture does not support {reason}"
    assert [role.channel.problem for role in (made.scheduler, made.worker)] == [problem, problem]
    assert made.worker.no_swap == problem
    assert not made.scheduler._requests.is_active


@pytest.mark.parametrize(
    "ranks", [{"tp_rank": 1, "tp_size": 2}, {"dp_rank": 1, "dp_size": 2}, {"pp_rank": 1, "pp_size": 2}]
)
def test_other_ranks_say_nothing(monkeypatch: pytest.MonkeyPatch, ranks: dict[str, Any]) -> None:
    run_with(monkeypatch, **ranks)

    assert not configuration.is_sender()
