"""Certificates of a test's own authority, as files."""

import ssl
from pathlib import Path

import trustme
from tests.support.mounts import Mount

from updraft_chassis.credentials import Credentials, ServerTls


class Authority:
    """A CA and what it signed; `folder` holds the files."""

    def __init__(self, folder: Path) -> None:
        self._ca = trustme.CA()
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "ca.pem"
        self._ca.cert_pem.write_to_path(str(self.file))

    def server(self, *, clients: "Authority | None" = None) -> ServerTls:
        """A new certificate of 127.0.0.1, in the place of an earlier one; with `clients` only theirs get in."""
        cert_file, key_file = self._issue("127.0.0.1")
        return ServerTls(cert_file=cert_file, key_file=key_file, client_ca_file=clients.file if clients else None)

    def client(self, *, servers: "Authority", token_file: Path | None = None) -> Credentials:
        """A client with a certificate of this authority that believes `servers`."""
        cert_file, key_file = self._issue("pod.example")
        return Credentials(ca_file=servers.file, cert_file=cert_file, key_file=key_file, token_file=token_file)

    def _issue(self, identity: str) -> tuple[Path, Path]:
        issued = self._ca.issue_cert(identity)
        cert_file, key_file = self._folder / f"{identity}.pem", self._folder / f"{identity}.key"
        cert_file.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(str(key_file))
        return cert_file, key_file


class MountedCertificate:
    """A certificate of 127.0.0.1 in `folder` as a kubelet mounts it and renews it: always of the same CA."""

    def __init__(self, folder: Path) -> None:
        self._authority = Authority(folder / "authority")
        self._mount = Mount(folder / "mount")
        self.folder = self._mount.folder
        self.cert_file, self.key_file = self.folder / "tls.crt", self.folder / "tls.key"
        self.trusting = ssl.create_default_context(cafile=self._authority.file)
        """For clients."""
        self.renew()

    def renew(self) -> None:
        made = self._authority.server()
        cert = made.cert_file.read_text()
        self._newest = ssl.PEM_cert_to_DER_cert(cert)
        self._mount.sync({"tls.crt": cert, "tls.key": made.key_file.read_text()})

    def spoil(self) -> None:
        """Replace the files, but not the newest certificate."""
        self._mount.sync({"tls.crt": "none", "tls.key": "none"})

    def is_shown_at(self, port: int) -> bool:
        """Whether a new connection to 127.0.0.1 gets the newest one. SSLError if its certificate is not of the CA."""
        shown = ssl.get_server_certificate(("127.0.0.1", port), ca_certs=str(self._authority.file), timeout=60)
        return ssl.PEM_cert_to_DER_cert(shown) == self._newest
