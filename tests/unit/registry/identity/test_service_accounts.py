"""Which tokens of ServiceAccounts are valid, with real keys and signatures."""

import base64
import hashlib
import hmac
import json
import time
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from tests.support.service_accounts import (
    ACCOUNTS,
    AUDIENCE,
    ISSUER,
    OPERATOR,
    SERVING,
    TRAINER,
    SigningKey,
    key_set,
)

from updraft_chassis.access import Caller, Grant, Role
from updraft_chassis.clock import SystemClock
from updraft_chassis.errors import InvalidInput, Unauthenticated
from updraft_registry.identity.keys import KeySet
from updraft_registry.identity.service_accounts import LEEWAY_S, Expected, ServiceAccounts, parse_accounts

RSA, OTHER = SigningKey("rsa-1"), SigningKey("rsa-1")
"""Two keys that claim to be the same one."""
ELLIPTIC = SigningKey("ec-1", curve=ec.SECP256R1())


@pytest.fixture
def registry() -> ServiceAccounts:
    async def fetch() -> bytes:
        return key_set(RSA, ELLIPTIC)

    expected = Expected(issuer=ISSUER, audience=AUDIENCE, accounts=parse_accounts(ACCOUNTS))
    return ServiceAccounts(expected, KeySet(fetch, SystemClock()), SystemClock())


async def known(registry: ServiceAccounts, token: str) -> Caller:
    caller = await registry.caller(token)
    assert caller is not None
    return caller


@pytest.mark.parametrize("key", [pytest.param(RSA, id="RS256"), pytest.param(ELLIPTIC, id="ES256")])
@pytest.mark.parametrize(
    ("account", "role"), [(SERVING, Role.SERVE), (TRAINER, Role.PUBLISH), (OPERATOR, Role.OPERATE)]
)
async def test_an_account_has_the_role_that_the_registry_was_given(
    registry: ServiceAccounts, key: SigningKey, account: str, role: Role
) -> None:
    assert (await known(registry, key.token(account))).roles == {role}


async def test_a_token_says_which_pod_it_is_bound_to_and_how_long_it_is_valid(registry: ServiceAccounts) -> None:
    caller = await known(registry, RSA.token(pod="qwen-serving-7", expires_s=600))

    assert caller.pod == "qwen-serving-7"
    assert caller.valid_s is not None
    assert 600 <= caller.valid_s <= 600 + LEEWAY_S


async def test_a_token_that_someone_requested_for_the_account_is_bound_to_no_pod(registry: ServiceAccounts) -> None:
    assert (await known(registry, RSA.token())).pod == ""


def without_signature(token: str) -> str:
    header, payload, _ = token.split(".")
    decoded = json.loads(base64.urlsafe_b64decode(header + "=="))
    unsigned = base64.urlsafe_b64encode(json.dumps(decoded | {"alg": "none"}).encode()).rstrip(b"=").decode()
    return f"{unsigned}.{payload}."


def signed_with_the_public_key(algorithm: str = "HS256") -> str:
    """The classic confusion: the public key, which everybody has, as the secret of a symmetric algorithm."""
    form = {"encoding": serialization.Encoding.PEM, "format": serialization.PublicFormat.SubjectPublicKeyInfo}
    secret: bytes = RSA.private.public_key().public_bytes(**form)
    payload = RSA.token().split(".")[1]
    header = base64.urlsafe_b64encode(json.dumps({"alg": algorithm, "kid": RSA.key_id}).encode()).rstrip(b"=").decode()
    signature = hmac.new(secret, f"{header}.{payload}".encode(), hashlib.sha256).digest()
    return f"{header}.{payload}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


def changed() -> str:
    """A signed token whose account was exchanged afterwards."""
    header, _, signature = RSA.token().split(".")
    return f"{header}.{RSA.token(OPERATOR).split('.')[1]}.{signature}"


@pytest.mark.attack(
    boundary="registry",
    attack="unsigned, expired and changed tokens, and those of other keys, audiences and accounts",
    outcome="UNAUTHENTICATED with the reason, without the token",
)
@pytest.mark.parametrize(
    ("token", "reason"),
    [
        pytest.param(RSA.token(iss="https://other.example"), "from another issuer than https://kube", id="issuer"),
        pytest.param(RSA.token(iss=ISSUER + "/"), "from another issuer", id="almost the issuer"),
        pytest.param(RSA.token(aud=["https://kubernetes.default.svc"]), "for another audience than", id="audience"),
        pytest.param(RSA.token(aud=["updraft-registry/team/other"]), "for another audience", id="other registry"),
        pytest.param(RSA.token(aud=[]), "missing the .aud. claim", id="no audience"),
        pytest.param(RSA.token(expires_s=-LEEWAY_S - 1), "has expired", id="expired"),
        pytest.param(RSA.token(nbf=int(time.time()) + 86_400), "is not valid yet", id="not yet valid"),
        pytest.param(RSA.token(iat=int(time.time()) + 86_400), "is not valid yet", id="issued in the future"),
        *(
            pytest.param(RSA.token(**dict[str, Any]({claim: None})), f'missing the "{claim}" claim', id=f"no {claim}")
            for claim in ("exp", "iat", "nbf", "sub")
        ),
        pytest.param(without_signature(RSA.token()), "not signed with RS256", id="alg none"),
        pytest.param(without_signature(RSA.token())[:-1], None, id="alg none in two parts"),
        pytest.param(signed_with_the_public_key(), "not signed with RS256", id="HS256 with the public key"),
        pytest.param(
            RSA.token(algorithm="RS512"), "not signed with RS256", id="another algorithm of the same key's type"
        ),
        pytest.param(
            ELLIPTIC.token(headers={"kid": RSA.key_id}), "not signed with RS256", id="ES256 with the ID of an RSA key"
        ),
        pytest.param(OTHER.token(), "has a wrong signature", id="another key with the same ID"),
        pytest.param(changed(), "has a wrong signature", id="changed account"),
        pytest.param(SigningKey("rsa-2").token(), "key 'rsa-2', which is not one of the cluster's", id="unknown key"),
        pytest.param(RSA.token(headers={"kid": ""}), "key ''", id="no key ID"),
        pytest.param(RSA.token("other:qwen-serving"), "'other:qwen-serving' has no role", id="other namespace"),
        pytest.param(RSA.token("team:llama-serving"), "'team:llama-serving' has no role", id="other speculator"),
        pytest.param(RSA.token("team:default"), "'team:default' has no role", id="default account"),
        pytest.param(RSA.token(sub="admin"), "'admin' has no role", id="a user"),
        pytest.param(RSA.token(sub=["a"]), "is not valid", id="a list as subject"),
        pytest.param("a-static-token-0123456789", None, id="no JSON Web Token"),
        pytest.param("a.b.c", None, id="three words"),
        pytest.param("." * 4000, None, id="dots"),
    ],
)
async def test_a_token_that_is_not_valid_here_is_refused_with_the_reason(
    registry: ServiceAccounts, token: str, reason: str | None
) -> None:
    if reason is None:  # left to other authorities
        assert await registry.caller(token) is None
        return
    with pytest.raises(Unauthenticated, match=reason) as refused:
        await registry.caller(token)
    assert token.split(".")[1] not in str(refused.value)


async def test_clocks_may_differ_a_little(registry: ServiceAccounts) -> None:
    await known(registry, RSA.token(expires_s=-LEEWAY_S + 10))
    await known(registry, RSA.token(nbf=int(time.time()) + LEEWAY_S - 10))


@pytest.mark.attack(
    boundary="registry",
    attack="a token with its own key, or the address of one",
    outcome="only the cluster's keys count; nothing is fetched",
)
async def test_a_key_inside_the_token_is_not_used(registry: ServiceAccounts) -> None:
    for headers in ({"jwk": OTHER.public}, {"jku": "https://evil.example/jwks"}, {"x5u": "https://evil.example"}):
        with pytest.raises(Unauthenticated, match="wrong signature"):
            await registry.caller(OTHER.token(headers=headers))


def test_accounts_are_listed_as_role_namespace_and_name() -> None:
    assert parse_accounts(" serve:team/qwen-serving, read:ops/dash.board ,") == {
        "system:serviceaccount:team:qwen-serving": {Grant(role=Role.SERVE)},
        "system:serviceaccount:ops:dash.board": {Grant(role=Role.READ)},
    }


def test_parts_that_share_an_account_share_their_roles() -> None:
    accounts = parse_accounts("serve@chat:team/own,publish:team/own,serve@chat:team/own")
    assert accounts == {
        "system:serviceaccount:team:own": {Grant(role=Role.SERVE, speculator="chat"), Grant(role=Role.PUBLISH)}
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("admin:team/qwen", "roles read, serve, publish, operate"),
        ("publish@chat:team/qwen", "or serve@speculator:namespace/name"),
        ("serve@:team/qwen", "or serve@speculator:namespace/name"),
        ("serve:qwen", "is not role:namespace/name"),
        ("serve:team/qwen:extra", "is not role:namespace/name"),
        ("serve:*/qwen", "is not role:namespace/name"),
    ],
)
def test_a_wrong_list_of_accounts_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        parse_accounts(text)


def test_the_tests_sign_what_the_library_verifies() -> None:
    decoded: Any = jwt.decode(RSA.token(), jwt.PyJWK(RSA.public, "RS256"), algorithms=["RS256"], audience=AUDIENCE)
    assert decoded["sub"] == f"system:serviceaccount:{SERVING}"
