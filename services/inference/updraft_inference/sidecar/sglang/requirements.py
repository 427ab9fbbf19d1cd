"""Requirements of an SGLang server. A later release than the tested ones is accepted: checksums prove each swap, and the
plugin checks its hooks at startup."""

import logging
from pathlib import Path

from updraft_artifacts.model_folder import target_fingerprint
from updraft_chassis.errors import InvalidInput
from updraft_inference.sidecar.sglang.server import ServerInfo
from updraft_sglang.weights import LOADER

logger = logging.getLogger(__name__)

_INTRODUCED = {
    (0, 5, 15): "load plugins by entry point",
    (0, 5, 19): "report which version generated which token",
    (0, 5, 21): "update the weights of a draft alone",
    (0, 5, 23): "report that it is paused",
}
"""First release with each feature that Updraft needs."""

_TESTED = ((0, 5, 23),)
"""Releases that the contract tests run against."""


def is_tested(version: str) -> bool:
    """Whether a release ("0.5.23", "0.5.24.post1") is tested. Raises InvalidInput if it is too old or not a release."""
    parts = version.split(".")[:3]
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise InvalidInput(f"the server reports version {version!r}, which is not a release of SGLang")
    number = tuple(map(int, parts))
    missing = [feature for first, feature in _INTRODUCED.items() if number < first]
    if missing:
        oldest = ".".join(map(str, max(_INTRODUCED)))
        raise InvalidInput(f"SGLang {version} is too old, {oldest} is required: it cannot {', nor '.join(missing)}")
    return number in _TESTED


def check_server(server: ServerInfo) -> None:
    """Raises InvalidInput with the arguments to change if drafts of this server cannot be swapped."""
    if not is_tested(server.version):
        logger.warning(
            "This release of SGLang is untested; checksums prove each swap, and the plugin checks its hooks",
            extra={"version": server.version},
        )
    requirements = [
        (server.algorithm == "EAGLE3", f"--speculative-algorithm EAGLE3 (it has {server.algorithm or 'none'})"),
        (server.num_branches == 1, "--speculative-eagle-topk 1: Updraft supports chains, not trees"),
        (
            LOADER in server.weight_loaders,
            f"--custom-weight-loader {LOADER}, with the plugin's folder on its PYTHONPATH",
        ),
        (server.dp_size == 1, "--dp-size 1: SGLang updates the weights of one replica only; run one pod per replica"),
        (server.num_nodes == 1, "--nnodes 1: Updraft does not support ranks on several nodes"),
        (server.pp_size == 1, "--pp-size 1: Updraft does not support pipeline parallelism"),
    ]
    missing = [argument for is_met, argument in requirements if not is_met]
    if missing:
        raise InvalidInput(f"start the SGLang server with {'; and with '.join(missing)}")


def check_model(server: ServerInfo, model: Path, fingerprint: str) -> None:
    """Raises InvalidInput if the server serves another model than the folder `model` with this fingerprint."""
    served = Path(server.model_path)
    if served.resolve() == model.resolve():
        return
    if not served.is_dir():
        raise InvalidInput(
            f"the SGLang server serves {server.model_path}, which is not visible here;"
            f" start it with --model-path {model.resolve()}"
        )
    if target_fingerprint(served) != fingerprint:
        raise InvalidInput(f"the SGLang server serves {server.model_path}, which is not the same model as {model}")
