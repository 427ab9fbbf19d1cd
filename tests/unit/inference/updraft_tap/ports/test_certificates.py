"""uvicorn's TLS in a server's process, with the hook of the plugin: it follows files that are renewed."""

import asyncio
import pickle
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
import uvicorn.config
from tests.support.certificates import MountedCertificate

from updraft_tap.ports import certificates

_CONFIGURE = uvicorn.Config.__init__
_LOAD = (
    "import pickle, sys; config = pickle.load(sys.stdin.buffer); config.load(); print(bool(config.ssl.sni_callback))"
)


@pytest.fixture(autouse=True)
def _unhooked_afterwards() -> Iterator[None]:
    create, configure = uvicorn.config.create_ssl_context, uvicorn.Config.__init__
    yield
    uvicorn.config.create_ssl_context = create
    uvicorn.Config.__init__ = configure  # type: ignore[method-assign]


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


def older(self: Any, app: Any, ssl_certfile: Path, ssl_keyfile: str) -> None:
    """The constructor of a uvicorn without factories of contexts."""
    _CONFIGURE(self, app, ssl_certfile=ssl_certfile, ssl_keyfile=ssl_keyfile)


@pytest.mark.parametrize("configure", [_CONFIGURE, older])
async def test_each_renewal_is_shown_at_the_next_handshake(tmp_path: Path, configure: Any) -> None:
    uvicorn.Config.__init__ = configure  # type: ignore[method-assign]
    assert certificates.follow() == ""
    certificate = MountedCertificate(tmp_path)
    async with server(certificate) as port:
        assert await is_shown(certificate, port)
        for _ in range(3):
            certificate.renew()
            assert await is_shown(certificate, port)


def test_a_further_http_process_follows_before_it_has_the_plugin(tmp_path: Path) -> None:
    certificates.follow()
    certificate = MountedCertificate(tmp_path)
    files = {"ssl_certfile": str(certificate.cert_file), "ssl_keyfile": str(certificate.key_file)}
    config = uvicorn.Config("builtins:print", workers=2, **files)  # type: ignore[arg-type] # strings
    command = [sys.executable, "-c", _LOAD]
    done = subprocess.run(command, input=pickle.dumps(config), check=True, capture_output=True)
    assert done.stdout.split() == [b"True"]


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

    uvicorn.Config.__init__ = later  # type: ignore[assignment, method-assign] # as a later release might be
    assert certificates.follow() == "", "it still makes its context as before"
    uvicorn.config.create_ssl_context = later  # type: ignore[assignment]
    assert "expected certfile, keyfile" in certificates.follow()
    assert "cannot follow renewed certificates" in caplog.text
