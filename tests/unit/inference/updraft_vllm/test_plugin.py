import importlib.metadata
import sys
from pathlib import Path

import pytest

from updraft_inference.tap import plugin_folder
from updraft_tap.http.keys import KeysError
from updraft_vllm import plugin


def test_without_a_socket_the_plugin_does_nothing_and_needs_no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UPDRAFT_VLLM_SOCKET", raising=False)
    monkeypatch.delenv("UPDRAFT_VLLM_API_KEYS_FILE", raising=False)

    plugin.register()

    assert "vllm" not in sys.modules


@pytest.mark.parametrize(("name", "value"), [("TOP_K", "many"), ("TOP_K", "8")])
def test_what_does_not_fit_is_logged_and_ends_no_server(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, value: str
) -> None:
    monkeypatch.setenv("UPDRAFT_VLLM_SOCKET", "/nowhere")
    monkeypatch.setenv(f"UPDRAFT_VLLM_{name}", value)

    plugin.register()  # no vLLM is installed beside these tests

    expected = "UPDRAFT_VLLM_TOP_K is 'many'" if value == "many" else "Scheduler.__init__ does not exist"
    assert expected in caplog.text


@pytest.mark.parametrize(
    ("content", "name", "value", "words"),
    [
        (None, "TOP_K", "8", "cannot read the API keys file"),
        ("short", "TOP_K", "8", "line 1 of .* has 5 characters"),
        ("sk-one-0123456789", "TOP_K", "8", "no API key would be asked for: hooks do not fit vLLM"),
        ("sk-one-0123456789", "TOP_K", "many", "TOP_K is 'many'"),
        ("sk-one-0123456789", "MAX_REQUESTS_PER_KEY", "few", "MAX_REQUESTS_PER_KEY is 'few'"),
    ],
)
def test_a_server_that_would_not_ask_for_its_keys_does_not_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None, name: str, value: str, words: str
) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv("UPDRAFT_VLLM_SOCKET", "/nowhere")
    monkeypatch.setenv("UPDRAFT_VLLM_API_KEYS_FILE", str(file))
    monkeypatch.setenv(f"UPDRAFT_VLLM_{name}", value)

    with pytest.raises((KeysError, ValueError), match=words):
        plugin.register()  # no vLLM is installed beside these tests


def test_the_folder_is_what_pip_would_have_installed(tmp_path: Path) -> None:
    folder = plugin_folder.write(tmp_path, plugin_folder.VLLM)

    (distribution,) = importlib.metadata.distributions(path=[str(folder)])
    (point,) = distribution.entry_points
    assert (point.group, point.name, point.value) == ("vllm.general_plugins", "updraft", "updraft_vllm.plugin:register")
    assert {path.name for path in folder.iterdir() if path.is_dir()} >= {"updraft_tap", "updraft_vllm"}
