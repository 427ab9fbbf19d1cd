"""Keys and certificates in PEM format, made and read with `cryptography`.

Keys are of curve P-256, which every client knows and which takes a millisecond. A CA may sign servers only, no other CA.
"""

import ssl
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from updraft_operator.manifests.tls.terms import Certificate

E = TypeVar("E", bound=x509.ExtensionType)

_OWN_S = 315_360_000
"""Ten years: longer than a process runs."""

_MAX_SKEW_S = 300
_SKEW_PER_LIFE = 100
"""A certificate is valid from a moment before it was made, for peers whose clocks are behind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Authority:
    """A CA with its key."""

    facts: Certificate
    certificate: str
    key: str


def new_authority(life_s: float, now_s: float) -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(f"updraft {_key_id(key.public_key())[:16]}")  # CAs of one name would be taken for each other
    builder = _builder(key.public_key(), name, name, now_s, now_s + life_s, life_s)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    certificate = builder.add_extension(_usage(signs_certificates=True), critical=True).sign(key, hashes.SHA256())
    return Authority(facts=_facts(certificate, "", is_signed=True), certificate=_pem(certificate), key=_key_pem(key))


def sign(authority: Authority, name: str, life_s: float, now_s: float) -> tuple[str, str]:
    """A certificate of a server with this DNS name, and its key. It ends with the CA at the latest."""
    key = ec.generate_private_key(ec.SECP256R1())
    signing = _read_key(authority.key)
    issuer = x509.load_pem_x509_certificate(authority.certificate.encode())
    ends_s = min(now_s + life_s, authority.facts.not_after_s)
    builder = _builder(key.public_key(), _name("updraft"), issuer.subject, now_s, ends_s, life_s)
    builder = (
        builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()),
            critical=False,
        )
    )
    return _pem(builder.sign(signing, hashes.SHA256())), _key_pem(key)


def own_context(name: str, now_s: float) -> ssl.SSLContext:
    """A server's context with a certificate that nobody can check, for a port whose callers take any; it has no file."""
    authority = new_authority(_OWN_S, now_s)
    certificate, key = sign(authority, name, _OWN_S, now_s)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.NamedTemporaryFile("w") as pair:  # OpenSSL reads files only
        pair.write(certificate + key)
        pair.flush()
        context.load_cert_chain(pair.name)
    return context


def read_certificate(certificate: str, key: str, authorities: str) -> Certificate | None:
    """The first certificate of a chain; None if it is none, or if the key is not its own."""
    try:
        leaf = x509.load_pem_x509_certificate(certificate.encode())
        private = serialization.load_pem_private_key(key.encode(), password=None)
        if leaf.public_key() != private.public_key():
            return None
        trusted = x509.load_pem_x509_certificates(authorities.encode()) if authorities else []
        return _facts(leaf, authorities, is_signed=any(_is_signed_by(leaf, each) for each in trusted))
    except Exception:  # noqa: BLE001 - whatever is wrong with what somebody wrote, and the library has many words for it
        return None


def read_authorities(certificates: str, keys: str) -> tuple[Authority, ...]:
    """CAs and their keys, in the same order. ValueError if they are none."""
    try:
        return _authorities(certificates, keys)
    except Exception as error:
        raise ValueError(str(error)) from error


def _authorities(certificates: str, keys: str) -> tuple[Authority, ...]:
    found = x509.load_pem_x509_certificates(certificates.encode())
    private = [_read_key(key) for key in _split(keys)]
    if [each.public_key() for each in found] != [key.public_key() for key in private]:
        raise ValueError("certificates and keys do not belong together")
    return tuple(
        Authority(facts=_facts(each, "", is_signed=True), certificate=_pem(each), key=_key_pem(key))
        for each, key in zip(found, private, strict=True)
    )


def _is_signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _builder(
    key: ec.EllipticCurvePublicKey, subject: x509.Name, issuer: x509.Name, now_s: float, ends_s: float, life_s: float
) -> x509.CertificateBuilder:
    skew = timedelta(seconds=min(_MAX_SKEW_S, life_s / _SKEW_PER_LIFE))
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.fromtimestamp(now_s, UTC) - skew)
        .not_valid_after(datetime.fromtimestamp(ends_s, UTC))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _facts(certificate: x509.Certificate, authorities: str, *, is_signed: bool) -> Certificate:
    key_id = _extension(certificate, x509.SubjectKeyIdentifier)
    names = _extension(certificate, x509.SubjectAlternativeName)
    return Certificate(
        key_id=key_id.digest.hex() if key_id is not None else "",
        names=frozenset(names.get_values_for_type(x509.DNSName)) if names is not None else frozenset(),
        not_before_s=certificate.not_valid_before_utc.timestamp(),
        not_after_s=certificate.not_valid_after_utc.timestamp(),
        authorities=authorities,
        is_signed=is_signed,
    )


def _extension(certificate: x509.Certificate, kind: type[E]) -> E | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _split(keys: str) -> Sequence[str]:
    end = "-----END PRIVATE KEY-----\n"
    return [f"{key}{end}" for key in keys.split(end) if key.strip()]


def _read_key(pem: str) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(pem.encode(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("the key is of another kind than this operator makes")  # noqa: TRY004 - its value is wrong
    return key


def _key_id(key: ec.EllipticCurvePublicKey) -> str:
    return x509.SubjectKeyIdentifier.from_public_key(key).digest.hex()


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    pkcs8, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, pkcs8, plain).decode()
