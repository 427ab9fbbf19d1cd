"""Tokens and certificates, always read from files.

All of them are read again when their file changes, without a restart; if the new content is not valid, the previous one stays
in force. gRPC cannot replace what a client's channel trusts, so a client opens another channel for its next calls.
Rejected: secrets in environment variables, which child processes and crash reports inherit.
"""

import asyncio
import logging
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import grpc
import grpc.aio

from updraft_chassis.clock import Clock, SystemClock
from updraft_chassis.errors import InvalidInput

logger = logging.getLogger(__name__)

T = TypeVar("T")
Stamp = tuple[int, int, int]
Stamps = tuple[Stamp | None, ...]

AUTHORIZATION = "authorization"
SCHEME = "Bearer"

RETRY_S = 1.0
"""How long a file that could not be read is left alone, unless it changes."""

_MAX_FILE_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """A client's credentials. `ca_file`, or `authorities` in memory, enables TLS: the CAs of the server's certificate, in PEM
    format. Without them the channel is plaintext.

    `cert_file` and `key_file` are the client's certificate, for a server that requires one (mTLS). `server_name` is the name in
    the server's certificate; empty: the host of the address.
    """

    token_file: Path | None = None
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    server_name: str = ""
    authorities: bytes = b""

    @classmethod
    def of(cls, settings: object) -> Self:
        """From the settings `registry_token_file`, `registry_ca_file`, `registry_cert_file` and `registry_key_file`."""
        files = [field.name for field in fields(cls) if field.name.endswith("_file")]
        return cls(**{name: getattr(settings, f"registry_{name}") for name in files})

    def tls(self) -> "ReloadingFile[grpc.ChannelCredentials] | None":
        """None for plaintext. InvalidInput if a file is missing or has the wrong content."""
        pair = (self.cert_file, self.key_file)
        if any(pair) and not (self.ca_file and all(pair)):
            raise InvalidInput("a client's certificate file needs its key file, and both need the registry's CA file")
        if self.ca_file is None:
            trusted = self.authorities
            return ReloadingFile([], lambda: grpc.ssl_channel_credentials(trusted), what="CA") if trusted else None
        files = [file for file in (self.ca_file, *pair) if file is not None]
        return ReloadingFile(files, partial(_client_tls, *files), what="CA or certificate")

    def token(self) -> "ReloadingFile[str] | None":
        """The bearer token, or None to send none. InvalidInput if the file holds no token."""
        return None if self.token_file is None else token_in(self.token_file)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerTls:
    """A server's certificate and key. With `client_ca_file`, clients need a certificate from that CA (mTLS)."""

    cert_file: Path
    key_file: Path
    client_ca_file: Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """InvalidInput if a file is missing or has the wrong content."""
        files = [self.cert_file, self.key_file, *([self.client_ca_file] if self.client_ca_file else [])]
        current = ReloadingFile(files, self._read, what="certificate")
        return grpc.dynamic_ssl_server_credentials(
            current.get(),
            current.if_changed,  # type: ignore[arg-type] # called at every handshake; gRPC documents None as "unchanged"
            require_client_authentication=self.client_ca_file is not None,
        )

    def context(self) -> ssl.SSLContext:
        """For a server of HTTP, without client certificates. Each handshake uses the newest valid files.

        InvalidInput if a file is missing or has the wrong content.
        """
        current = ReloadingFile([self.cert_file, self.key_file], self._context, what="certificate")
        first = current.get()

        def use_newest(connection: ssl.SSLSocket | ssl.SSLObject, _: str | None, __: ssl.SSLContext) -> None:
            connection.context = current.get()

        first.sni_callback = use_newest  # OpenSSL calls it also if a client names no server
        return first

    def _context(self) -> ssl.SSLContext:
        _pair(self.cert_file, self.key_file)
        return _context(self.cert_file, self.key_file)

    def _read(self) -> grpc.ServerCertificateConfiguration:
        authority = None if self.client_ca_file is None else _authority(self.client_ca_file)
        return grpc.ssl_server_certificate_configuration([_pair(self.cert_file, self.key_file)], authority)


def server_context(cert_file: Path | None, key_file: Path | None) -> ssl.SSLContext | None:
    """`ServerTls.context` of files in settings; None if there are none. InvalidInput for one without the other."""
    if cert_file is None and key_file is None:
        return None
    if cert_file is None or key_file is None:
        raise InvalidInput("a certificate file and its key file require each other")
    return ServerTls(cert_file=cert_file, key_file=key_file).context()


def token_in(file: Path) -> "ReloadingFile[str]":
    """InvalidInput if the file holds no token."""
    return ReloadingFile([file], lambda: _token(file), what="token")


class ReloadingFile(Generic[T]):
    """The value read from files; `get` reads it again when one of them has changed.

    What could not be read is tried again, because the reason may pass without another change: no file descriptor was free.
    """

    def __init__(self, files: Sequence[Path], read: Callable[[], T], *, what: str, clock: Clock | None = None) -> None:
        self._files = files
        self._read = read
        self._what = what
        self._clock = clock or SystemClock()
        self._stamp = self._stamps()
        self._value = read()
        self._refused: tuple[Stamps, str] | None = None
        """The files that were not valid, and why."""
        self._retry_at = 0.0

    def get(self) -> T:
        """The newest valid value. It only checks the files' modification times, so it is cheap enough for every call."""
        stamp, refused = self._stamps(), self._refused  # gRPC's threads call this too
        if stamp == self._stamp:
            self._refused = None
        elif refused is None or stamp != refused[0] or self._clock.monotonic() >= self._retry_at:
            self._reload(stamp)
        return self._value

    def _reload(self, stamp: Stamps) -> None:
        try:
            self._value = self._read()
        except InvalidInput as error:
            refused = stamp, str(error)
            if refused != self._refused:
                extra = {"reason": str(error)}
                logger.error("The new %s is not valid; the previous one stays in force", self._what, extra=extra)
            self._refused, self._retry_at = refused, self._clock.monotonic() + RETRY_S
        else:
            self._stamp, self._refused = stamp, None
            logger.info("Reloaded the %s", self._what)

    def if_changed(self) -> T | None:
        """The result of `get` if it has changed since the last call, else None."""
        before = self._value
        return None if self.get() is before else self._value

    def _stamps(self) -> Stamps:
        return tuple(_stamp(file) for file in self._files)


class _Wrapper(grpc.aio.Channel):
    """A channel whose calls are those of another one."""

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        return self._method("unary_unary", args, kwargs)

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        return self._method("unary_stream", args, kwargs)

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        return self._method("stream_unary", args, kwargs)

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        return self._method("stream_stream", args, kwargs)

    def _method(self, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
        raise NotImplementedError

    def _channel_now(self) -> grpc.aio.Channel:
        raise NotImplementedError

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:  # noqa: FBT001, FBT002 - gRPC's
        return self._channel_now().get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._channel_now().wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._channel_now().channel_ready()

    async def close(self, grace: float | None = None) -> None:
        await self._channel_now().close(grace)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


@dataclass(slots=True)
class _OpenChannel:
    channel: grpc.aio.Channel
    num_calls: int = 0
    """Calls that have not ended."""


class ReloadingChannel(_Wrapper):
    """A channel that follows its certificates: when they change, the next call goes through a new channel. Calls in progress,
    such as a stream of hours, stay on the former one, which closes with the last of them."""

    def __init__(
        self,
        tls: ReloadingFile[grpc.ChannelCredentials],
        open_channel: Callable[[grpc.ChannelCredentials], grpc.aio.Channel],
    ) -> None:
        self._tls = tls
        self._open = open_channel
        self._trusted = tls.get()
        self._newest = _OpenChannel(open_channel(self._trusted))
        self._former: list[_OpenChannel] = []
        self._closing: set[asyncio.Task[None]] = set()

    def _method(self, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
        def call(*call_args: Any, **call_kwargs: Any) -> Any:
            self._replace_if_changed()
            used = self._newest
            started = getattr(used.channel, kind)(*args, **kwargs)(*call_args, **call_kwargs)
            used.num_calls += 1
            started.add_done_callback(lambda _: self._end_call(used))
            return started

        return call

    def _channel_now(self) -> grpc.aio.Channel:
        return self._newest.channel

    def _replace_if_changed(self) -> None:
        trusted = self._tls.get()
        if trusted is self._trusted:
            return
        former, self._trusted = self._newest, trusted
        self._newest = _OpenChannel(self._open(trusted))
        self._former.append(former)
        self._close_unused()

    def _end_call(self, used: _OpenChannel) -> None:
        used.num_calls -= 1
        if used is not self._newest:
            self._close_unused()

    def _close_unused(self) -> None:
        unused = [former for former in self._former if not former.num_calls]
        self._former = [former for former in self._former if former.num_calls]
        for each in unused:
            task = asyncio.get_running_loop().create_task(each.channel.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def close(self, grace: float | None = None) -> None:
        former, self._former = self._former, []
        await asyncio.gather(*(each.channel.close(grace) for each in (self._newest, *former)), *self._closing)


class TokenChannel(_Wrapper):
    """A channel whose calls carry a bearer token. It calls `token` for each call.

    Rejected: gRPC's call credentials, which require TLS in this process even behind a TLS proxy, and client interceptors,
    whose calls write and fail differently from plain ones.
    """

    def __init__(self, channel: grpc.aio.Channel, token: Callable[[], str]) -> None:
        self._channel = channel
        self._token = token

    def _channel_now(self) -> grpc.aio.Channel:
        return self._channel

    def _method(self, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
        method = getattr(self._channel, kind)(*args, **kwargs)

        def call(*call_args: Any, metadata: Any = None, **call_kwargs: Any) -> Any:
            authorization = (AUTHORIZATION, f"{SCHEME} {self._token()}")
            return method(*call_args, metadata=(*(metadata or ()), authorization), **call_kwargs)

        return call


def read_text(file: Path, what: str) -> str:
    """Read a small text file of `what`. The InvalidInput message never contains the file's content."""
    try:
        return _read(file, what).decode("ascii")
    except UnicodeDecodeError:
        raise InvalidInput(f"the {what} file {file} is not ASCII text") from None


def check_token(token: str, where: str) -> str:
    """Return the token if it can be sent in a header. The InvalidInput message names `where`, never the token."""
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise InvalidInput(f"{where} is no token: expected one word of printable ASCII")
    return token


def _token(file: Path) -> str:
    return check_token(read_text(file, "token").strip(), f"the content of {file}")


def _client_tls(ca_file: Path, cert_file: Path | None = None, key_file: Path | None = None) -> grpc.ChannelCredentials:
    roots = _authority(ca_file)
    if cert_file is None or key_file is None:
        return grpc.ssl_channel_credentials(roots)
    key, chain = _pair(cert_file, key_file)
    return grpc.ssl_channel_credentials(roots, key, chain)


def _authority(file: Path) -> bytes:
    content = _read(file, "CA")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(file)
    except OSError as error:  # SSLError is one
        raise InvalidInput(f"the CA file {file} holds no certificates in PEM format: {error}") from error
    return content


def _pair(cert_file: Path, key_file: Path) -> tuple[bytes, bytes]:
    """The key and the certificate chain, checked to match: gRPC would only report a mismatch to the peer, at a handshake."""
    chain, key = _read(cert_file, "certificate"), _read(key_file, "key")
    _context(cert_file, key_file)
    return key, chain


def _context(cert_file: Path, key_file: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Without a passphrase argument OpenSSL would prompt on the terminal.
        context.load_cert_chain(cert_file, key_file, password="")
    except OSError as error:  # SSLError is one
        raise InvalidInput(f"{cert_file} and {key_file} are not a PEM certificate and its key: {error}") from error
    return context


def _read(file: Path, what: str) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(_MAX_FILE_BYTES)
    except OSError as error:
        raise InvalidInput(f"the {what} file {file} cannot be read: {error.strerror}") from error


def _stamp(file: Path) -> Stamp | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
