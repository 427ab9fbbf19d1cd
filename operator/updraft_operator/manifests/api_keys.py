"""API keys of clients: the file, the variables that name it, and the probe of a server that must require them.

The plugin in a server requires the keys (ADR 0058). If the plugin is not loaded, the server requires none. So a server counts
as started only when it has refused a request without a key. Until then, no Service routes to it.
"""

import re
from typing import Any

from updraft_operator.api.speculator import Engine, Serving

_VOLUME, _FILE = "api-keys", "keys"
_FOLDER = "/etc/updraft/api-keys"

_OPTIONS = ("--api-key", "--admin-api-key")
"""Options of SGLang and vLLM. Their parsers also accept the first letters of an option."""
_SHORTEST = len("--ap")

_ASK = """
import http.client, ssl, sys
scheme, port = sys.argv[1:]
try:
    if scheme == "https":
        connection = http.client.HTTPSConnection(
            "127.0.0.1", int(port), timeout=4, context=ssl._create_unverified_context()
        )
    else:
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=4)
    connection.request("GET", "/v1/models")
    status = connection.getresponse().status
except OSError as error:
    sys.exit(f"the server does not answer yet: {error}")
if status != 401:
    sys.exit(f"a request without an API key got status {status}, expected 401: is Updraft's plugin loaded?")
"""
"""Exits with status 0 if the server at a port, which speaks http or https, refuses a request without a key."""


def in_arguments(engine: Engine) -> str:
    """Why `engine.args` are refused because they have a key; empty if they have none."""
    found = next(filter(_is_key, (re.split(r"[=\s]", word)[0] for word in engine.args)), "")
    if not found:
        return ""
    problem = f"spec.engine.args have {found}, and everyone who may read the spec or the pods can read its key"
    if found.startswith("--ad"):
        remedy = "leave it out, because each pod has an admin key of its own"
        return f"{problem}: {remedy}; spec.serving.apiKeysSecretRef has those of clients"
    return f"{problem}: name a Secret with the keys of clients in spec.serving.apiKeysSecretRef instead"


def _is_key(argument: str) -> bool:
    option = argument.replace("_", "-")
    return len(option) >= _SHORTEST and any(each.startswith(option) for each in _OPTIONS)


def volumes(serving: Serving) -> list[dict[str, Any]]:
    """The volume with the keys, which the kubelet updates when the Secret changes; none without keys."""
    ref = serving.api_keys_secret_ref
    if ref is None:
        return []
    secret = {"secretName": ref.name, "items": [{"key": ref.key, "path": _FILE}], "defaultMode": 0o440}
    return [{"name": _VOLUME, "secret": secret}]


def mounts(serving: Serving) -> list[dict[str, Any]]:
    if serving.api_keys_secret_ref is None:
        return []
    return [{"name": _VOLUME, "mountPath": _FOLDER, "readOnly": True}]


def variables(serving: Serving, prefix: str) -> dict[str, str]:
    """The settings of the process that requires the keys and knows tenants, by name."""
    header = {} if serving.tenant_header is None else {f"{prefix}_TENANT_HEADER": serving.tenant_header}
    if serving.api_keys_secret_ref is None:
        return header
    limit = serving.max_requests_per_key
    return {
        f"{prefix}_API_KEYS_FILE": f"{_FOLDER}/{_FILE}",
        **({f"{prefix}_MAX_REQUESTS_PER_KEY": str(limit)} if limit is not None else {}),
        **header,
    }


def probe(port: int, scheme: str, *, period_s: int, failures: int) -> dict[str, Any]:
    """A probe that succeeds if the server requires a key. `-I` ignores PYTHONPATH, so the probe loads no plugins."""
    return {
        "exec": {"command": ["python3", "-I", "-c", _ASK, scheme, str(port)]},
        "periodSeconds": period_s,
        "timeoutSeconds": 10,
        "failureThreshold": failures,
    }
