"""Claims that the StatefulSet's controller makes, while no operator runs that could set their owner."""

from tests.cluster.operator.subject import Subject
from tests.support.manifests import CONFIG
from tests.support.wait import wait_until

from updraft_operator.api.speculator import AdaptiveSpeculator
from updraft_operator.manifests import accounts, trainer

_CLAIM = "PersistentVolumeClaim"


def test_a_claim_that_kubernetes_makes_again_goes_with_the_resource(subject: Subject) -> None:
    owner = AdaptiveSpeculator.model_validate(subject.create(trainer={"nodes": 2}))
    for made in (*accounts.objects(owner), *trainer.objects(owner, CONFIG)):
        if made["kind"] != _CLAIM:
            subject.api.create(subject.path(made["kind"], "x").removesuffix("/x"), made)
    wait_until(lambda: len(subject.all_of(_CLAIM)) == 2, what="two claims")

    subject.delete()

    wait_until(lambda: not subject.exists("StatefulSet", f"{subject.name}-trainer"), what="the end of the set")
    wait_until(lambda: not subject.all_of(_CLAIM), what="the end of the claims")
