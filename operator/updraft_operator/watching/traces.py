"""Deletion of a speculator's traces in Redis."""

import asyncio
from contextlib import aclosing

from updraft_chassis import streams
from updraft_chassis.errors import Unavailable, UpdraftError
from updraft_operator.api.speculator import AdaptiveSpeculator
from updraft_operator.manifests.manifest import OperatorConfig
from updraft_operator.manifests.redis import stream_namespace, url_secret
from updraft_operator.manifests.redis_users import Role
from updraft_operator.watching.foreign_redis import bounded
from updraft_operator.watching.secrets import Secrets

_TIMEOUT_S = 5.0
_AGAIN_S = 2.0


async def delete_traces(secrets: Secrets, own_url: str, owner: AdaptiveSpeculator, config: OperatorConfig) -> None:
    """Delete the speculator's streams and dead letters. Unavailable if Redis does not answer, so that it is retried."""
    metadata, own = owner.metadata, url_secret(owner, Role.READER)
    url = own_url if own is None else await secrets.entry(metadata.namespace, own.name, own.key)
    if not url:
        return
    client = streams.connect(url) if own is None else bounded(streams.connect(url))
    try:
        async with asyncio.timeout(_TIMEOUT_S), aclosing(client):
            await streams.delete(client, stream_namespace(owner, config), metadata.name)
    except (UpdraftError, TimeoutError) as error:
        raise Unavailable(f"cannot delete the traces in Redis: {error}", _AGAIN_S) from error
