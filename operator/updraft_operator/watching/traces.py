"""Traces of a speculator that is deleted with all its data."""

import asyncio
import logging

import redis.exceptions

from updraft_chassis import streams
from updraft_chassis.errors import Unavailable
from updraft_operator.api.speculator import AdaptiveSpeculator
from updraft_operator.watching.secrets import Secrets

logger = logging.getLogger(__name__)

_TIMEOUT_S = 5.0
_AGAIN_S = 2.0


async def delete_traces(secrets: Secrets, own_url: str, owner: AdaptiveSpeculator) -> None:
    """Delete its stream and its dead letters. Unavailable when Redis is away: it is tried again."""
    metadata, said = owner.metadata, owner.spec.traces.redis
    url = own_url
    if said is not None:
        url = await secrets.entry(metadata.namespace, said.url_secret_ref.name, said.url_secret_ref.key)
    if not url:
        return
    key = streams.key(metadata.namespace, metadata.name)
    try:
        async with asyncio.timeout(_TIMEOUT_S), streams.connect(url) as client:
            await client.delete(key, f"{key}:dead")
    except (redis.exceptions.RedisError, TimeoutError) as error:
        raise Unavailable(f"the traces cannot be deleted yet: {error}", _AGAIN_S) from error
