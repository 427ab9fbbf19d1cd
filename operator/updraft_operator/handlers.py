"""kopf, in one file: it watches, and says which speculator something happened to. It decides and writes nothing.

Only low-level event handlers are registered, which leave no mark, no finalizer and no annotation on any object.
"""

from collections.abc import Callable
from typing import Any

import kopf

from updraft_operator.api import names
from updraft_operator.cluster import CHILDREN, KINDS
from updraft_operator.store import Key, Store, key_of

Add = Callable[[Key], None]


def registry(store: Store, add: Add) -> kopf.OperatorRegistry:
    """Handlers that fill the store and call `add`."""
    handlers = kopf.OperatorRegistry()
    for kind, resource in KINDS.items():
        kopf.on.event(
            *(resource.group, resource.version, resource.plural),
            registry=handlers,
            id=f"see-{resource.plural}",
        )(_seen(kind, store, add))
    kopf.on.login(registry=handlers, id="service-account")(_login)
    return handlers


def settings() -> kopf.OperatorSettings:
    """What is set on purpose; the rest is kopf's."""
    chosen = kopf.OperatorSettings()
    chosen.posting.enabled = False  # events are ours to tell, on transitions only
    chosen.scanning.disabled = True  # no right to list definitions or namespaces is asked for
    chosen.watching.server_timeout = 290
    chosen.watching.client_timeout = 300
    chosen.watching.connect_timeout = 10
    chosen.networking.connect_timeout = 10
    chosen.networking.enforce_retry_after = True
    chosen.watching.reconnect_backoff = 0.5
    # Not ours: kopf takes its finalizer off whatever no handler of its own needs one for.
    chosen.persistence.finalizer = f"{names.GROUP}/kopf"
    for kind in (*CHILDREN, "Pod"):
        resource = KINDS[kind]
        where = (resource.group, resource.version, resource.plural)
        chosen.watching.label_selectors[where] = f"{names.MANAGED_BY}={names.MANAGER}"
    return chosen


def _seen(kind: str, store: Store, add: Add) -> Callable[..., Any]:
    async def handle(event: kopf.RawEvent, **_: Any) -> None:
        body: Any = event["object"]
        if event["type"] == "DELETED":
            key = key_of(kind, body)
            if key is not None:
                store.drop(kind, key, body["metadata"]["name"], body["metadata"]["resourceVersion"])
        else:
            key = store.put(kind, body)
        if key is not None:
            add(key)

    return handle


def _login(**kwargs: Any) -> kopf.ConnectionInfo | None:
    return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)
