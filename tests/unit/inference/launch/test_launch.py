"""What an SGLang server starts with: the admin key, arguments, environment."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from tests.support.tiny_target import make_draft, make_tiny_target, save_draft

from updraft_artifacts.model_folder import describe
from updraft_chassis.errors import InvalidInput
from updraft_inference.launch import admin_key, sglang_arguments, supervisor
from updraft_inference.sidecar.sglang import draft_fingerprint
from updraft_inference.sidecar.sglang.server import ServerInfo
from updraft_inference.tap.server_kind import SGLANG
from updraft_sglang import weights


@pytest.mark.attack(
    boundary="plugin",
    attack="another user of the machine reads the admin key",
    outcome="the file is not readable by others",
)
def test_the_admin_key_is_written_once_and_others_cannot_read_it(tmp_path: Path) -> None:
    file = tmp_path / "new" / "server.yaml"
    admin_key.write(file)
    key = admin_key.read(file)

    admin_key.write(file)

    assert admin_key.read(file) == key
    assert len(key) == 64
    assert yaml.safe_load(file.read_text()) == {"admin-api-key": key}, "as SGLang's --config reads it"
    assert file.stat().st_mode & 0o007 == 0
    assert [path.name for path in file.parent.iterdir()] == ["server.yaml"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"admin-api-key": ""}',
        '{"admin-api-key": null}',
        '{"admin-api-key": 7}',
        '{"admin-api-key": "two words"}',
        '{"host": "x"}',
    ],
)
def test_what_holds_no_admin_key_is_refused_without_being_told(tmp_path: Path, content: str) -> None:
    (file := tmp_path / "server.yaml").write_text(content)

    with pytest.raises(InvalidInput, match=r"server\.yaml") as refused:
        admin_key.read(file)

    assert "two words" not in str(refused.value)


def test_a_key_that_was_chosen_replaces_the_one_in_the_file_and_one_that_is_no_token_does_not(tmp_path: Path) -> None:
    admin_key.write(file := tmp_path / "server.yaml")

    admin_key.write(file, "chosen")
    with pytest.raises(InvalidInput, match="the admin-api-key is no token") as refused:
        admin_key.write(file, "two words")

    assert admin_key.read(file) == "chosen"
    assert "two words" not in str(refused.value)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_target(tmp_path_factory.mktemp("models") / "target")


def test_the_loader_has_the_name_that_the_plugin_gives_it() -> None:
    options = sglang_arguments.speculation(Path("/seed"), 3)

    assert options[options.index("--custom-weight-loader") + 1] == weights.LOADER
    assert options[options.index("--speculative-num-draft-tokens") + 1] == "4"


def test_without_drafts_nothing_could_be_learnt_so_it_is_refused() -> None:
    with pytest.raises(InvalidInput, match="UPDRAFT_INFERENCE_LOOKAHEAD"):
        sglang_arguments.speculation(Path("/seed"), 0)


def test_a_context_is_as_large_as_wanted_or_as_the_model_allows(target: Path) -> None:
    limit = describe(target).max_position

    assert int(sglang_arguments.context(target, 100, 3)[1]) > 104
    assert sglang_arguments.context(target, 10**6, 3) == ["--context-length", str(limit)]


@pytest.mark.attack(
    boundary="plugin",
    attack="code inside the server reads Updraft's secrets from its environment",
    outcome="they are not there",
)
def test_the_server_gets_the_plugin_and_none_of_our_secrets() -> None:
    inherited = {
        "PATH": "/bin",
        "PYTHONPATH": "/mine",
        "SGLANG_PLUGINS": "mine",
        "UPDRAFT_INFERENCE_REDIS_URL": "redis://:secret@redis",
        "UPDRAFT_SGLANG_TOP_K": "32",
    }

    made = supervisor.environment(SGLANG, inherited, plugin=Path("/plugin"), socket=Path("/run/s"))

    assert made == {
        "PATH": "/bin",
        "PYTHONPATH": f"/plugin{os.pathsep}/mine",
        "SGLANG_PLUGINS": "mine,updraft",
        "UPDRAFT_SGLANG_SOCKET": "/run/s",
        "UPDRAFT_SGLANG_TOP_K": "32",
    }


def test_a_draft_that_sglang_has_no_network_for_is_refused(target: Path, tmp_path: Path) -> None:
    network = make_draft(target)
    network.config = replace(network.config, norm_before_residual=True)
    save_draft(network, tmp_path / "draft")
    info = ServerInfo(
        version="0.5.23",
        model_path=str(target),
        device="cpu",
        dtype="bfloat16",
        tp_size=1,
        dp_size=1,
        pp_size=1,
        algorithm="EAGLE3",
        draft_path=str(tmp_path / "draft"),
        num_branches=1,
        weight_loaders=(),
    )
    with pytest.raises(InvalidInput, match="norm_before_residual"):
        draft_fingerprint.read_initial_draft(tmp_path / "draft", info)
