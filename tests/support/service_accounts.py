"""Tokens of ServiceAccounts as an API server issues them: real keys, real signatures, and the key set that it publishes."""

import json
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

ISSUER = "https://kubernetes.default.svc.cluster.local"
AUDIENCE = "updraft-registry/team/qwen"
ACCOUNTS = (
    "serve@default:team/qwen-serving,publish:team/qwen-trainer,operate:updraft-system/updraft-operator,"
    "read:team/dashboard"
)
SERVING, TRAINER, OPERATOR = "team:qwen-serving", "team:qwen-trainer", "updraft-system:updraft-operator"


class SigningKey:
    """A private key with an ID: RSA of `bits`, or elliptic."""

    def __init__(self, key_id: str, *, bits: int = 2048, curve: ec.EllipticCurve | None = None) -> None:
        self.key_id = key_id
        self._curve = curve
        self._bits = bits

    @cached_property
    def private(self) -> Any:
        if self._curve is not None:
            return ec.generate_private_key(self._curve)
        return rsa.generate_private_key(public_exponent=65537, key_size=self._bits)

    @property
    def public(self) -> dict[str, Any]:
        """As a JSON Web Key."""
        algorithm = RSAAlgorithm if self._curve is None else ECAlgorithm
        key = json.loads(algorithm.to_jwk(self.private.public_key()))
        return {name: value for name, value in key.items() if name != "key_ops"} | {"use": "sig", "kid": self.key_id}

    def token(
        self,
        account: str = SERVING,
        *,
        pod: str = "",
        algorithm: str = "",
        key: Any = None,
        headers: dict[str, Any] | None = None,
        expires_s: float = 3600,
        **claims: Any,
    ) -> str:
        """A token of `NAMESPACE:NAME`; a claim that is None is left out."""
        namespace, name = account.split(":")
        now_s = int(time.time())
        bound: dict[str, Any] = {"namespace": namespace, "serviceaccount": {"name": name, "uid": "1"}}
        given = {
            "aud": [AUDIENCE],
            "exp": now_s + expires_s,
            "iat": now_s,
            "iss": ISSUER,
            "jti": "0",
            "kubernetes.io": bound | ({"pod": {"name": pod, "uid": "2"}} if pod else {}),
            "nbf": now_s,
            "sub": f"system:serviceaccount:{account}",
            **claims,
        }
        payload = {name: value for name, value in given.items() if value is not None}
        algorithm = algorithm or ("RS256" if self._curve is None else "ES256")
        signed_with = self.private if key is None else key
        return jwt.encode(payload, signed_with, algorithm, headers={"kid": self.key_id, **(headers or {})})


def key_set(*keys: SigningKey) -> bytes:
    """The answer of /openid/v1/jwks."""
    return json.dumps({"keys": [key.public for key in keys]}).encode()


def write_key_set(file: Path, *keys: SigningKey) -> Path:
    file.write_bytes(key_set(*keys))
    return file
