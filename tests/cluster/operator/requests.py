"""What somebody asked the API server for, from its audit log."""

import json
from datetime import UTC, datetime

from tests.cluster.access import Audited, audited
from tests.cluster.control_plane import ControlPlane

WRITES = {"create", "update", "patch", "delete", "deletecollection"}


def now() -> str:
    """This moment as the audit log writes it."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def requests(cluster: ControlPlane, user: str, since: str = "", *, namespace: str = "") -> list[Audited]:
    """All requests of a user, oldest first; leases and tokens are no work and are left out."""
    return [
        each
        for each in audited(cluster.audit_log)
        if each.user == user
        and each.time >= since
        and each.resource not in ("leases", "serviceaccounts/token")
        and (not namespace or each.namespace == namespace)
    ]


def writes(cluster: ControlPlane, user: str, since: str = "", *, namespace: str = "") -> list[Audited]:
    """Those that change something, or try to."""
    return [each for each in requests(cluster, user, since, namespace=namespace) if each.verb in WRITES]


def num_listings(cluster: ControlPlane, user: str, since: str) -> int:
    """How often everything was listed anew: Jobs come last, and a watch does not list them without end."""
    return sum(each.verb == "list" and each.resource == "pods" for each in requests(cluster, user, since))


def denied(cluster: ControlPlane, user: str) -> list[str]:
    """What its rights did not allow: not what a quota or the end of a namespace forbade."""
    told = []
    for line in cluster.audit_log.read_text().split("\n")[:-1]:  # the last one may still be written
        if user in line and "forbid" in line:
            event = json.loads(line)
            is_denied = event.get("annotations", {}).get("authorization.k8s.io/decision") == "forbid"
            if is_denied and event["user"]["username"] == user:
                told.append(f"{event['verb']} {event['requestURI']}")
    return told
