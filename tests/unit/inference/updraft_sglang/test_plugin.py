import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from updraft_sglang import names, plugin
from updraft_tap.settings import Settings


def test_without_a_socket_the_plugin_does_nothing_and_needs_no_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UPDRAFT_SGLANG_SOCKET", raising=False)

    plugin.register()

    assert "sglang" not in sys.modules


@pytest.mark.parametrize("is_sender", [True, False])
def test_a_server_that_the_plugin_cannot_read_is_told_by_its_first_rank_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, is_sender: bool
) -> None:
    def fail() -> dict[str, int]:
        raise RuntimeError("no such field")

    monkeypatch.setattr(plugin, "_is_sender", lambda: is_sender)
    monkeypatch.setattr(plugin, "_ranks", fail)
    monkeypatch.setattr(plugin, "share_vocabulary", lambda _: None)
    made, started = plugin.Plugin(Settings(socket=str(tmp_path / "socket")), {}), list[str]()
    for channel in (made.scheduler, made.worker):
        monkeypatch.setattr(channel, "start", lambda channel=channel: started.append(channel.problem))

    made.start(lambda _: None, SimpleNamespace(draft_worker=None))

    problem = "the plugin could not start: RuntimeError: no such field"
    assert started == ([problem, problem] if is_sender else [])


def test_a_server_that_should_require_keys_and_cannot_does_not_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("UPDRAFT_SGLANG_SERVER", "UPDRAFT_SGLANG_SECRET", "UPDRAFT_SGLANG_HTTP_APP", names.APP_PATH):
        monkeypatch.setenv(name, "left by this test")  # so that it is put back
    monkeypatch.setenv("UPDRAFT_SGLANG_API_KEYS_FILE", str(tmp_path / "missing"))

    with pytest.raises(SystemExit, match="API keys cannot be enforced: KeysError: cannot read"):
        plugin.register()
