import sys

import pytest

from updraft_sglang import plugin


def test_without_a_socket_the_plugin_does_nothing_and_needs_no_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UPDRAFT_SGLANG_SOCKET", raising=False)

    plugin.register()

    assert "sglang" not in sys.modules
