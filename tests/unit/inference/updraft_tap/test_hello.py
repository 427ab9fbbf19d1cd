import os
from typing import Any

from updraft_tap import __version__
from updraft_tap.hello import Hello, answered_policy
from updraft_tap.policy import Policy
from updraft_tap.weights import ServedVersion


class Channel:
    def __init__(self) -> None:
        self.replies: list[dict[str, Any]] = []

    def reply(self, header: dict[str, Any]) -> None:
        self.replies.append(header)


def test_a_hello_says_what_is_true_when_it_is_said() -> None:
    served = ServedVersion()
    hello = Hello("worker", server="s", engine="SGLang", version="0.5.23", served=served)
    before = hello.facts()
    served.version, served.digest = 7, "sha256:7"
    hello.learn(device="cuda:1")

    assert (before["version"], before["device"], before["role"], before["server"]) == (0, "", "worker", "s")
    assert before["engine"] == {"name": "SGLang", "version": "0.5.23"}
    assert (before["pid"], before["tap"]) == (os.getpid(), __version__)
    assert (hello.facts()["version"], hello.facts()["digest"], hello.facts()["device"]) == (7, "sha256:7", "cuda:1")


def test_a_policy_is_answered_by_what_is_in_effect() -> None:
    channel, asked = Channel(), {"payload": 0.5, "prompt_rows": 3, "counterfactual_rows": 1, "opt_in": True}

    policy = answered_policy({"kind": "policy", **asked}, channel)  # type: ignore[arg-type]  # stands for it

    assert policy == Policy(payload=0.5, prompt_rows=3, counterfactual_rows=1, opt_in=True)
    assert channel.replies == [{"kind": "policy", **asked}]


def test_a_policy_that_is_none_captures_nothing() -> None:
    channel = Channel()
    assert answered_policy({"kind": "policy", "payload": "much"}, channel) == Policy()  # type: ignore[arg-type]
    assert channel.replies[0]["payload"] == 0
