"""The port of clients while TLS is turned on or off: pods that run are reachable until those that follow them are."""

from updraft_operator.api import names
from updraft_operator.manifests.tls import port
from updraft_operator.planning.objects import Ref
from updraft_operator.planning.observed import Observed
from updraft_operator.planning.serving.availability import is_rolling


def is_changing_port(observed: Observed) -> bool:
    """Whether pods may still run whose port has the other name."""
    deployment = observed.child("Deployment", names.SERVING)
    service = observed.children.get(Ref("Service", observed.name))
    if deployment is None or service is None:
        return False
    wanted = port.scheme(observed.speculator.spec.serving)
    if all(each.get("name") == wanted for each in service.live()["spec"].get("ports") or ()):
        return False
    containers = deployment.live()["spec"]["template"]["spec"]["containers"]
    names_now = {each.get("name") for container in containers for each in container.get("ports") or ()}
    return wanted not in names_now or is_rolling(deployment)


def secret_problem(observed: Observed) -> str:
    """Why pods with the Secret that the spec names would not start, while pods run that do not mount it; empty otherwise."""
    reference, deployment = observed.speculator.spec.serving.tls_secret_ref, observed.child("Deployment", names.SERVING)
    if reference is None or deployment is None:
        return ""
    volumes = deployment.live()["spec"]["template"]["spec"].get("volumes") or ()
    if any((volume.get("secret") or {}).get("secretName") == reference.name for volume in volumes):
        return ""
    wrong = (missing.problem for missing in observed.missing_secrets if missing.name == reference.name)
    return next(
        (f"Secret {reference.name}: {problem or 'it does not exist, or lacks an entry'}" for problem in wrong), ""
    )
