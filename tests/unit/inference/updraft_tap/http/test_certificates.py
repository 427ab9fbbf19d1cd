"""uvicorn's TLS in a server's process, with the hook of the plugin: it follows files that are renewed."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvicorn
import uvicorn.config
from tests.support.certificates import Authority
from tests.support.mounts import Mount

from updraft_tap.http import certificates


@pytest.fixture(autouse=True)
def _unhooked_afterwards() -> Iterator[None]:
    original = uvicorn.config.create_ssl_context
    yield
    uvicorn.config.create_ssl_context = original


class Files:
    """A certificate as a kubelet mounts it."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.mount, self._num = folder, Mount(folder / "mount"), 0

    def renew(self) -> Authority:
        self._num += 1
        authority = Authority(self._folder / str(self._num))
        made = authority.server()
        self.mount.sync({"tls.crt": made.cert_file.read_text(), "tls.key": made.key_file.read_text()})
        return authority


@asynccontextmanager
async def server(files: Files) -> AsyncIterator[int]:
    """As SGLang and vLLM configure uvicorn."""

    async def app(scope: object, receive: object, send: object) -> None:
        raise AssertionError("nothing is requested")

    folder = files.mount.folder
    config = uvicorn.Config(app, ssl_certfile=folder / "tls.crt", ssl_keyfile=str(folder / "tls.key"))
    config.load()
    listening = await asyncio.get_running_loop().create_server(asyncio.Protocol, "127.0.0.1", 0, ssl=config.ssl)
    async with listening:
        yield listening.sockets[0].getsockname()[1]


async def shakes_hands(port: int, authority: Authority) -> None:
    """Raises SSLError if the server's certificate is of another CA."""
    trusted = ssl.create_default_context(cafile=authority.file)
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusted, server_hostname="127.0.0.1")
    writer.close()


async def test_each_renewal_is_shown_at_the_next_handshake(tmp_path: Path) -> None:
    assert certificates.follow() == ""
    files = Files(tmp_path)
    former = files.renew()
    async with server(files) as port:
        await shakes_hands(port, former)
        for _ in range(3):
            newest = files.renew()
            await shakes_hands(port, newest)
            with pytest.raises(ssl.SSLError):
                await shakes_hands(port, former)
            former = newest


async def test_a_file_that_holds_no_certificate_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    certificates.follow()
    files = Files(tmp_path)
    authority = files.renew()
    async with server(files) as port:
        files.mount.sync({"tls.crt": "none", "tls.key": "none"})
        for _ in range(2):
            await shakes_hands(port, authority)
    assert [record.getMessage() for record in caplog.records if "not valid" in record.getMessage()] != []


def test_a_uvicorn_of_another_shape_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def later(options: object) -> object:
        return options

    uvicorn.config.create_ssl_context = later  # type: ignore[assignment] # as a later release might be
    assert "expected certfile, keyfile" in certificates.follow()
    assert "cannot follow renewed certificates" in caplog.text
