"""Certificates and tokens of a whole stack are renewed under load, and nobody notices. `make bench-rotation` takes longer."""

from pathlib import Path

import pytest
from tests.support.redis_server import RedisServer
from tests.support.rotation_storm import Pace, Seen, storm
from tests.support.tiny_target import make_tiny_target
from tests.support.tiny_tokenizer import write_tokenizer

PACE = Pace(renew_s=2.0, certificate_s=60.0, token_s=10.0)
"""Lives with which a machine that stands still for seconds fails no test; streams outlive a token twice."""


@pytest.mark.attack(
    boundary="registry",
    attack="certificates and tokens of registry, pod and trainer, renewed every few seconds under load",
    outcome="no request fails, and no trace is lost",
)
async def test_no_request_fails_and_no_trace_is_lost_while_everything_is_renewed(
    short_tmp_path: Path, redis_server: RedisServer
) -> None:
    target = make_tiny_target(write_tokenizer(short_tmp_path / "tiny"))
    nobody_noticed(await storm(short_tmp_path, target, PACE, seconds=20.0, redis_url=redis_server.url))


@pytest.mark.attack(
    boundary="redis",
    attack="certificates of Redis, registry, pod and trainer, renewed every few seconds under load",
    outcome="no request fails, and no trace is lost",
)
async def test_nobody_notices_that_redis_renews_its_certificate_too(
    short_tmp_path: Path, tls_redis_server: Path
) -> None:
    target = make_tiny_target(write_tokenizer(short_tmp_path / "tiny"))
    nobody_noticed(await storm(short_tmp_path, target, PACE, seconds=20.0, redis_program=tls_redis_server))


def nobody_noticed(seen: Seen) -> None:
    assert seen.failed == []
    assert (seen.lost, seen.dropped) == (0, 0)
    assert seen.renewals > 3
    assert seen.requests > 0
