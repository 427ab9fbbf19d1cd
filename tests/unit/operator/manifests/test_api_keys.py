"""Keys that users put into the arguments of a server."""

import pytest
from tests.support.manifests import speculator

from updraft_operator.manifests.api_keys import in_arguments


def _problem(*args: str, engine: str = "SGLang") -> str:
    return in_arguments(speculator({"engine": {"type": engine, "args": list(args)}}).spec.engine)


@pytest.mark.parametrize("engine", ["SGLang", "VLLM"])
@pytest.mark.parametrize(
    "args",
    [
        *(["--api-key", "sk-1"], ["--api-key=sk-1"], ["--api_key", "sk-1"], ["--api-k", "sk-1"]),
        *(["--ap", "sk-1"], ["--ap=sk-1"], ["--api", "sk-1"], ["--api=sk-1"], ["--api_", "sk-1"], ["--api-ke=sk-1"]),
    ],
)
def test_a_key_of_clients_is_refused_with_the_field_that_takes_it(args: list[str], engine: str) -> None:
    problem = _problem("--mem-fraction-static", "0.8", *args, engine=engine)

    assert problem.startswith(f"spec.engine.args have {args[0].partition('=')[0]}, ")
    assert problem.endswith("name a Secret with the keys of clients in spec.serving.apiKeysSecretRef instead")
    assert "sk-1" not in problem


@pytest.mark.parametrize(
    "argument",
    ["--admin-api-key", "--admin-api-key=sk-1", "--admin_api_key", "--ad", "--adm", "--admin=sk-1", "--admin-api"],
)
def test_an_admin_key_is_refused_because_each_pod_has_its_own(argument: str) -> None:
    problem = _problem(argument, "sk-1")

    assert "each pod has an admin key of its own; spec.serving.apiKeysSecretRef has those of clients" in problem
    assert "sk-1" not in problem


@pytest.mark.parametrize(
    "args",
    [
        *([], ["--config", "/etc/mine.yaml"], ["--api-server-count", "2"], ["x--api-key"], ["--a", "--", "-"]),
        *(["--allow-auto-truncate"], ["--allowed-origins", "*"], ["--attention-backend", "triton"]),
        *(["--api-key-of-something-else", "1"], ["--adapters", "1"]),
    ],
)
def test_other_arguments_are_accepted(args: list[str]) -> None:
    assert _problem(*args) == ""
