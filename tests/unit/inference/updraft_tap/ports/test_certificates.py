"""uvicorn's TLS in a server's process, with the hook of the plugin: it follows files that are renewed."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvicorn
import uvicorn.config
from tests.support.certificates import MountedCertificate

from updraft_tap.ports import certificates


@pytest.fixture(autouse=True)
def _unhooked_afterwards() -> Iterator[None]:
    original = uvicorn.config.create_ssl_context
    yield
    uvicorn.config.create_ssl_context = original


@asynccontextmanager
async def server(certificate: MountedCertificate) -> AsyncIterator[int]:
    """As SGLang and vLLM configure uvicorn."""

    async def app(scope: object, receive: object, send: object) -> None:
        raise AssertionError("nothing is requested")

    config = uvicorn.Config(app, ssl_certfile=certificate.cert_file, ssl_keyfile=str(certificate.key_file))
    config.load()
    listening = await asyncio.get_running_loop().create_server(asyncio.Protocol, "127.0.0.1", 0, ssl=config.ssl)
    async with listening:
        yield listening.sockets[0].getsockname()[1]


async def is_shown(certificate: MountedCertificate, port: int) -> bool:
    return await asyncio.to_thread(certificate.is_shown_at, port)


async def test_each_renewal_is_shown_at_the_next_handshake(tmp_path: Path) -> None:
    assert certificates.follow() == ""
    certificate = MountedCertificate(tmp_path)
    async with server(certificate) as port:
        assert await is_shown(certificate, port)
        for _ in range(3):
            certificate.renew()
            assert await is_shown(certificate, port)


async def test_a_file_that_holds_no_certificate_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    certificates.follow()
    certificate = MountedCertificate(tmp_path)
    async with server(certificate) as port:
        certificate.spoil()
        for _ in range(2):
            assert await is_shown(certificate, port)
    assert [record.getMessage() for record in caplog.records if "not valid" in record.getMessage()] != []


def test_a_uvicorn_of_another_shape_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def later(options: object) -> object:
        return options

    uvicorn.config.create_ssl_context = later  # type: ignore[assignment] # as a later release might be
    assert "expected certfile, keyfile" in certificates.follow()
    assert "cannot follow renewed certificates" in caplog.text
