"""Who we are on the wire and whom we believe: tokens and certificates, always as files.

What rotates is read again when its file changes, without a restart: a server's certificate and tokens, a client's token
(a client's certificate is read once: gRPC cannot exchange it). What cannot be read then leaves what was read before in
force. Refused: secrets in variables, which child processes and crash reports inherit.
"""

import logging
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import grpc
import grpc.aio

from updraft_chassis.errors import InvalidInput

logger = logging.getLogger(__name__)

T = TypeVar("T")

AUTHORIZATION = "authorization"
SCHEME = "Bearer"

_MAX_FILE_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """What a client brings. With `ca_file` (of the server's certificate) it speaks TLS, else plaintext.

    `cert_file` and `key_file` are the client's own certificate, for a server that asks for one.
    """

    token_file: Path | None = None
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None

    def tls(self) -> grpc.ChannelCredentials | None:
        """For the channel; None: plaintext. InvalidInput for files that are not what they should be."""
        pair = (self.cert_file, self.key_file)
        if any(pair) and not (self.ca_file and all(pair)):
            raise InvalidInput("a client's certificate file needs its key file, and both need the registry's CA file")
        if self.ca_file is None:
            return None
        roots = _authority(self.ca_file)
        if self.cert_file is None or self.key_file is None:
            return grpc.ssl_channel_credentials(roots)
        key, chain = _pair(self.cert_file, self.key_file)
        return grpc.ssl_channel_credentials(roots, key, chain)

    def token(self) -> "ReloadingFile[str] | None":
        """The bearer token; None: none is sent. InvalidInput for a file without one."""
        file = self.token_file
        return None if file is None else ReloadingFile([file], lambda: _token(file), what="token")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerTls:
    """A server's certificate and key. With `client_ca_file` only clients with a certificate of that CA get in (mTLS)."""

    cert_file: Path
    key_file: Path
    client_ca_file: Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """For the port; InvalidInput for files that are not what they should be."""
        files = [self.cert_file, self.key_file, *([self.client_ca_file] if self.client_ca_file else [])]
        current = ReloadingFile(files, self._read, what="certificate")
        return grpc.dynamic_ssl_server_credentials(
            current.get(),
            current.if_changed,  # type: ignore[arg-type] # asked at every handshake; None: as before, says gRPC's page
            require_client_authentication=self.client_ca_file is not None,
        )

    def _read(self) -> grpc.ServerCertificateConfiguration:
        authority = None if self.client_ca_file is None else _authority(self.client_ca_file)
        return grpc.ssl_server_certificate_configuration([_pair(self.cert_file, self.key_file)], authority)


class ReloadingFile(Generic[T]):
    """What files hold, read again by `get` once one of them has changed."""

    def __init__(self, files: Sequence[Path], read: Callable[[], T], *, what: str) -> None:
        self._files = files
        self._read = read
        self._what = what
        self._stamp = self._stamps()
        self._value = read()

    def get(self) -> T:
        """The newest that could be read. Only looks at the files' times: cheap enough for every call."""
        stamp = self._stamps()
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._value = self._read()
            except InvalidInput as error:
                extra = {"reason": str(error)}
                logger.error("The new %s cannot be used; the one before stays in force", self._what, extra=extra)
            else:
                logger.info("A new %s was read", self._what)
        return self._value

    def if_changed(self) -> T | None:
        """What `get` returns, if that is another than before."""
        before = self._value
        return None if self.get() is before else self._value

    def _stamps(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(_stamp(file) for file in self._files)


class TokenChannel(grpc.aio.Channel):
    """A channel whose calls carry a bearer token.

    Refused: gRPC's call credentials, which want TLS in this very process, and its client interceptors, whose calls
    write and fail in other ways than plain ones.
    """

    def __init__(self, channel: grpc.aio.Channel, token: ReloadingFile[str]) -> None:
        self._channel = channel
        self._token = token

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        """See grpc.aio.Channel, also below."""
        return self._with_token(self._channel.unary_unary(*args, **kwargs))

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        return self._with_token(self._channel.unary_stream(*args, **kwargs))

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        return self._with_token(self._channel.stream_unary(*args, **kwargs))

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        return self._with_token(self._channel.stream_stream(*args, **kwargs))

    def _with_token(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, metadata: Any = None, **kwargs: Any) -> Any:
            authorization = (AUTHORIZATION, f"{SCHEME} {self._token.get()}")
            return method(*args, metadata=(*(metadata or ()), authorization), **kwargs)

        return call

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:  # noqa: FBT001, FBT002 - gRPC's
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._channel.channel_ready()

    async def close(self, grace: float | None = None) -> None:
        await self._channel.close(grace)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def read_text(file: Path, what: str) -> str:
    """A small text file; InvalidInput names `what` it should hold, never what it holds."""
    try:
        return _read(file, what).decode("ascii")
    except UnicodeDecodeError:
        raise InvalidInput(f"the {what} file {file} holds something else than ASCII text") from None


def check_token(token: str, where: str) -> str:
    """The token, if it can travel in a header; InvalidInput says `where` it stands, never what it is."""
    if not token or not token.isprintable() or " " in token:
        raise InvalidInput(f"{where} is no token: expected one word of printable ASCII")
    return token


def _token(file: Path) -> str:
    return check_token(read_text(file, "token").strip(), f"what the file {file} holds")


def _authority(file: Path) -> bytes:
    content = _read(file, "CA")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(file)
    except OSError as error:  # SSLError is one
        raise InvalidInput(f"the CA file {file} holds no certificates in PEM format: {error}") from error
    return content


def _pair(cert_file: Path, key_file: Path) -> tuple[bytes, bytes]:
    """Key and chain, which belong together: gRPC itself would only say at a handshake, to the other side."""
    chain, key = _read(cert_file, "certificate"), _read(key_file, "key")
    try:
        # An empty passphrase: OpenSSL would ask for one on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert_file, key_file, password="")
    except OSError as error:  # SSLError is one
        raise InvalidInput(
            f"{cert_file} and {key_file} are no certificate and its key in PEM format: {error}"
        ) from error
    return key, chain


def _read(file: Path, what: str) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(_MAX_FILE_BYTES)
    except OSError as error:
        raise InvalidInput(f"the {what} file {file} cannot be read: {error.strerror}") from error


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
