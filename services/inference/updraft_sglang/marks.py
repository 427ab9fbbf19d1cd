"""The mark that carries a sender's terms from SGLang's HTTP process to its scheduler, in a request's custom parameters. Pure.

Clients may put any object there, and some of SGLang's servers bypass the Python HTTP process. So a mark counts only with a
seal: a secret that the processes of a server share and that clients do not know.
"""

import hmac
from collections.abc import Mapping
from typing import Any

from updraft_tap.http.terms import NOT_ASKED, Terms, has_mark, marked, read_mark

SEAL = "updraft_seal"
"""The custom parameter with the seal."""


def sealed(params: Mapping[str, Any] | None, terms: Terms | None, secret: str) -> dict[str, Any] | None:
    """The custom parameters of a request, with the sealed mark of these terms instead of any other; None if empty."""
    others = marked({name: value for name, value in (params or {}).items() if name != SEAL}, terms)
    return others if terms is None else {**(others or {}), SEAL: secret}


def is_sealed(params: object, secret: str) -> bool:
    """Whether a request passed the middleware."""
    if not secret or not isinstance(params, Mapping) or not isinstance(params.get(SEAL), str):
        return False
    return hmac.compare_digest(params[SEAL].encode("utf-8", "replace"), secret.encode()) and has_mark(params)


def read_sealed(params: object, secret: str) -> Terms:
    """The terms in the custom parameters of a request; NOT_ASKED without a sealed mark."""
    return read_mark(params) if isinstance(params, Mapping) and is_sealed(params, secret) else NOT_ASKED
