"""Deletion of a speculator's traces in Redis."""

import asyncio
from contextlib import aclosing

from updraft_chassis import streams
from updraft_chassis.errors import Unavailable, UpdraftError
from updraft_operator.api.speculator import AdaptiveSpeculator
from updraft_operator.watching.secrets import Secrets

_TIMEOUT_S = 5.0
_AGAIN_S = 2.0


async def delete_traces(secrets: Secrets, own_url: str, owner: AdaptiveSpeculator) -> None:
    """Delete the speculator's streams and dead letters. Unavailable if Redis does not answer, so that it is retried."""
    metadata, redis_spec = owner.metadata, owner.spec.traces.redis
    url = own_url
    if redis_spec is not None:
        url = await secrets.entry(metadata.namespace, redis_spec.url_secret_ref.name, redis_spec.url_secret_ref.key)
    if not url:
        return
    client = streams.connect(url)
    try:
        async with asyncio.timeout(_TIMEOUT_S), aclosing(client):
            await streams.delete(client, metadata.namespace, metadata.name)
    except (UpdraftError, TimeoutError) as error:
        raise Unavailable(f"cannot delete the traces in Redis: {error}", _AGAIN_S) from error
