"""A speculator, its pods and a clock, decided on by the registry's own code: what a test does to them in one line each."""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from tests.support.versions import NOW_MS, evaluation, holding, version

from updraft_registry.rollout.comparison import Evidence, Ratio, Slice
from updraft_registry.rollout.decision import Decision, decide
from updraft_registry.rollout.placement import Directive, Pod
from updraft_registry.rollout.version import DesiredState, Rollout, Speculator, Version
from updraft_rollouts.policy import RolloutPolicy, RolloutStep
from updraft_rollouts.terms import Phase, Source

BETTER, WORSE = 3.0, 1.5


def seen(gain_percent: float = 0.0, *, slices: int = 12, latency_percent: float = 0.0, failures: int = 0) -> Evidence:
    """Evidence of this change in acceptance and latency, with a noise of 1 % between slices of 50 requests."""
    acceptance = latency = Ratio()
    for i in range(slices):
        noise = 1.01 if i % 2 else 1 / 1.01
        acceptance = _plus(acceptance, gain_percent, noise)
        latency = _plus(latency, latency_percent, noise)
    return Evidence(
        acceptance=acceptance,
        latency=latency,
        slices=slices,
        candidate_requests=50 * slices,
        failures=failures,
        open=Slice(since_ms=NOW_MS),
    )


def _plus(ratio: Ratio, percent: float, noise: float) -> Ratio:
    return ratio.plus(math.exp(math.log1p(percent / 100)) * noise, 1.0)


class World:
    """Version 1 is stable on all pods. Nothing happens but what a test does."""

    def __init__(self, num_pods: int = 16, **policy: Any) -> None:
        first = version(1, Phase.STABLE)
        self.speculator = Speculator(
            name="default", desired=DesiredState(policy=RolloutPolicy(**policy)), versions=(first,), latest=1
        )
        self.pods = {pod.name: pod for pod in (holding(f"pod-{i:02}", first) for i in range(num_pods))}
        self.now_ms = NOW_MS
        self.is_settled = True
        self.remembered: dict[str, int] = {}
        self.decision = self.decide()

    # What happens.

    def decide(self, *, after_s: float = 0.0) -> Decision:
        """Let time pass, then decide."""
        self.now_ms += int(1000 * after_s)
        self.decision = decide(
            self.speculator,
            list(self.pods.values()),
            self.now_ms,
            directed=self.remembered,
            is_settled=self.is_settled,
        )
        self.remembered = {name: order.serve for name, order in self.decision.directives.items()}
        self.speculator = replace(self.speculator, versions=self.decision.versions, rollout=self.decision.rollout)
        return self.decision

    def run(self, seconds: float, *, step_s: float = 1.0) -> Decision:
        """Decide once a second; the pods obey."""
        for _ in range(math.ceil(seconds / step_s)):
            self.decide(after_s=step_s)
            self.obey()
        return self.decide()

    def publish(self, quality: float | None = BETTER, *, source: Source = Source.TRAINER) -> int:
        """A version that was compared with the stable one; decided on."""
        number = self.speculator.latest + 1
        measured = None if quality is None else evaluation(quality, against=self.stable)
        published = version(number, evaluation=measured, source=source)
        self.speculator = replace(self.speculator, versions=(*self.speculator.versions, published), latest=number)
        self.decide()
        return number

    def canary(self, **seen_so_far: Any) -> int:
        """A version in canary, on its pods; with arguments, with this evidence."""
        number = self.publish()
        self.obey()
        self.decide()
        if seen_so_far:
            self.see(**seen_so_far)
        return number

    def see(self, gain_percent: float = 0.0, **more: Any) -> None:
        """Let this have been seen; not decided on."""
        self.speculator = replace(self.speculator, rollout=replace(self.rollout, evidence=seen(gain_percent, **more)))

    def desired(self, **wishes: Any) -> Decision:
        """Pin, pause and so on; decided on."""
        self.speculator = replace(self.speculator, desired=replace(self.speculator.desired, **wishes))
        return self.decide()

    def policy(self, **fields: Any) -> Decision:
        """Change the policy; decided on."""
        return self.desired(policy=replace(self.speculator.desired.policy, **fields))

    def obey(self, names: Iterable[str] | None = None) -> None:
        """Pods load what they are told; in a switchback they fetch the other one."""
        for name in self.pods if names is None else names:
            order = self.decision.directives.get(name)
            if order is not None:
                self.pods[name] = obeyed(self.pods[name], order, self.speculator.versions)

    def leave(self, name: str) -> None:
        """A pod drains, and then it is gone."""
        self.pods[name] = replace(self.pods[name], is_draining=True)
        self.decide()
        del self.pods[name]

    def die(self, name: str) -> None:
        """A pod's process ends without a word: the registry has its last report, and no stream."""
        self.pods[name] = replace(self.pods[name], is_connected=False)

    def start(self, name: str, boot: str) -> None:
        """A pod's process begins a new life with the stable version, from its disk."""
        held = next(v for v in self.speculator.versions if v.number == self.stable)
        self.pods[name] = replace(holding(name, held), boot=boot)

    def restart(self) -> None:
        """The registry stops and starts again: it has what it wrote, and no pod has reported yet."""
        rollout = self.speculator.rollout
        written = Rollout.from_json(rollout.to_json()) if rollout else None
        self.speculator = replace(self.speculator, rollout=written)
        self.remembered, self.is_settled = {}, False

    # What is the case.

    @property
    def rollout(self) -> Rollout:
        assert self.speculator.rollout is not None, "no canary runs"
        return self.speculator.rollout

    @property
    def stable(self) -> int:
        return max((v.number for v in self.speculator.versions if v.phase is Phase.STABLE), default=0)

    @property
    def phases(self) -> dict[int, Phase]:
        return {v.number: v.phase for v in self.speculator.versions}

    @property
    def message(self) -> str:
        return self.decision.message

    def directed(self, number: int) -> set[str]:
        """Pods that are ordered to serve a version, all the time or in turn."""
        return {
            name
            for name, order in self.decision.directives.items()
            if number == order.serve or (order.switchback and number in order.switchback.versions)
        }


def obeyed(pod: Pod, order: Directive, versions: Iterable[Version]) -> Pod:
    """A pod that has done what it was told."""
    held = next((v for v in versions if v.number == order.serve), None)
    return replace(
        pod,
        loaded=order.serve,
        tensors_digest=held.tensors_digest if held else "",
        prefetched=frozenset(order.prefetch),
        refused=0,
        refusal="",
    )


STEPS = (RolloutStep(pods_percent=10, hold_seconds=60), RolloutStep(pods_percent=50, hold_seconds=60))
