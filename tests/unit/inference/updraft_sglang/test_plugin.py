import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from updraft_sglang import plugin
from updraft_tap.settings import Settings


def test_without_a_socket_the_plugin_does_nothing_and_needs_no_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UPDRAFT_SGLANG_SOCKET", raising=False)

    plugin.register()

    assert "sglang" not in sys.modules


@pytest.mark.parametrize("is_sender", [True, False])
def test_facts_that_cannot_be_gathered_start_no_channel_of_another_rank(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, is_sender: bool
) -> None:
    def fail() -> dict[str, int]:
        raise RuntimeError("no such field")

    monkeypatch.setattr(plugin, "_is_sender", lambda: is_sender)
    monkeypatch.setattr(plugin, "_ranks", fail)
    monkeypatch.setattr(plugin, "share_vocabulary", lambda _: None)
    made, started = plugin.Plugin(Settings(socket=str(tmp_path / "socket"))), list[str]()
    monkeypatch.setattr(made, "_problem", lambda _: "")
    monkeypatch.setattr(made.channel, "start", lambda: started.append(made.channel.problem))

    made.start(lambda _: None, SimpleNamespace(draft_worker=None))

    assert started == ([""] if is_sender else []), "capture needs no facts"
