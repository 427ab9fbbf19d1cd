"""The desired objects of one speculator, as a function of what people and the cluster decide and of the operator itself.

`Inputs` is the first, the same for every operator; the second is called the runtime. Keeping the two apart shows why a pod
template differs from the one that pods have: whether somebody asked for the change, or only the operator is another one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from updraft_operator.api import names
from updraft_operator.api.speculator import Spec
from updraft_operator.manifests import accounts, ranks, registry, serving, trainer
from updraft_operator.manifests.manifest import Manifest
from updraft_operator.manifests.redis_users import Role
from updraft_operator.manifests.tls import objects as tls
from updraft_operator.manifests.tls.terms import TlsMode
from updraft_operator.planning import lineage, trainers
from updraft_operator.planning.observed import Observed
from updraft_operator.planning.serving.tls_port import is_changing_port
from updraft_operator.planning.traces import access
from updraft_operator.planning.traces.places import Places, server, tls_servers
from updraft_operator.planning.traces.shards import with_streams

_NO_INPUTS: dict[str, Any] = {
    **dict.fromkeys(("suspend", "deletion_policy", "rollout", "update_policy"), True),
    "serving": {"replicas", "rolling_update", "disruption_budget"},
}
"""Fields of a spec that no template depends on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The part of a world that pod templates follow from, besides the operator."""

    spec: Spec
    marks: Mapping[Role, str]
    """See OperatorConfig.redis_marks."""
    places: Mapping[Role, str]
    """See OperatorConfig.redis_places."""
    draft_config: str
    """See `lineage.draft_config`."""
    tls_mode: TlsMode

    @classmethod
    def of(cls, observed: Observed, decided: Places) -> "Inputs":
        return cls(
            spec=with_streams(observed).spec,
            marks=access.marks(observed, decided),
            places={role: place for role, place in decided.targets.items() if place is not decided.wanted},
            draft_config=lineage.draft_config(observed),
            tls_mode=observed.config.tls.mode,
        )

    def to_json(self) -> dict[str, Any]:
        """Only fields set in the object are kept, so that a newer operator applies its own defaults to the same fields.

        Fields on which no template depends are left out, because autoscalers and people change them.
        """
        spec = self.spec.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude=_NO_INPUTS)
        return {
            "spec": {name: value for name, value in spec.items() if value != {}},
            "marks": dict(self.marks),
            "places": dict(self.places),
            "draft": self.draft_config,
            "tls": self.tls_mode.value,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Inputs":
        """Raises ValueError, KeyError, TypeError or AttributeError for inputs that this operator does not understand."""
        return cls(
            spec=Spec.model_validate(content["spec"]),
            marks={Role(role): str(mark) for role, mark in content["marks"].items()},
            places={Role(role): str(place) for role, place in content["places"].items()},
            draft_config=str(content["draft"]),
            tls_mode=TlsMode(content["tls"]),
        )


def render(observed: Observed, decided: Places, inputs: Inputs) -> list[Manifest]:
    """All desired objects, in the order of their creation."""
    observed = _with(observed, inputs)
    owner, config = observed.speculator, observed.config
    deployment = observed.child("Deployment", names.SERVING)
    is_scaled = deployment is not None and deployment.is_scaled_by_others
    return [
        *accounts.objects(owner),
        *server(observed, decided),
        *tls.objects(owner, config, tls_servers(observed)),
        *registry.objects(owner, config),
        *_trainer(observed),
        *serving.objects(
            owner,
            config,
            sets_replicas=not is_scaled,
            draft_config=inputs.draft_config,
            keeps_port=is_changing_port(observed),
        ),
    ]


def _with(observed: Observed, inputs: Inputs) -> Observed:
    config = replace(
        observed.config,
        redis_marks=inputs.marks,
        redis_places=inputs.places,
        tls=replace(observed.config.tls, mode=inputs.tls_mode),
    )
    owner = observed.speculator.model_copy(update={"spec": inputs.spec})
    return replace(observed, speculator=owner, config=config)


def _trainer(observed: Observed) -> list[Manifest]:
    """Nothing if none runs, and the spec names a kind of object that the cluster does not serve."""
    waits, kind = bool(lineage.waits(observed) or trainers.former_pods(observed)), trainers.kind(observed)
    if kind is ranks.Kind.LEADER_WORKER_SET and not observed.config.has_leader_worker_sets:
        return []
    return trainer.objects(observed.speculator, observed.config, kind=kind, waits=waits)
