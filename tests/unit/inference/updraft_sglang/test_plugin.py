import os
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from updraft_sglang import configuration, names, plugin, roles
from updraft_sglang.reloads import UnprovedDraft
from updraft_tap.channel import Channel
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

    monkeypatch.setattr(configuration, "is_sender", lambda: is_sender)
    monkeypatch.setattr(configuration, "several_ranks", lambda: "")
    monkeypatch.setattr(configuration, "ranks", fail)
    monkeypatch.setattr(plugin, "share_vocabulary", lambda _: None)
    made, started = plugin.Plugin(Settings(socket=str(tmp_path / "socket")), {}), list[str]()
    for channel in (made.scheduler.channel, made.worker.channel):
        monkeypatch.setattr(channel, "start", lambda channel=channel: started.append(channel.problem))

    made.start(lambda _: None, SimpleNamespace(draft_worker=None))

    problem = "the plugin could not start: RuntimeError: no such field"
    assert started == ([problem, problem] if is_sender else [])


@pytest.mark.parametrize("is_sender", [True, False])
def test_of_several_ranks_the_one_that_tells_the_agent_watches_for_other_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, is_sender: bool
) -> None:
    monkeypatch.setattr(configuration, "is_sender", lambda: is_sender)
    monkeypatch.setattr(configuration, "several_ranks", lambda: "it has 2 ranks")
    monkeypatch.setattr(plugin, "share_vocabulary", lambda _: None)
    monkeypatch.setattr(Channel, "start", lambda _: None)
    for role in (roles.SchedulerRole, roles.WorkerRole):
        monkeypatch.setattr(role, "check", lambda *_: None)
    made = plugin.Plugin(Settings(socket=str(tmp_path / "socket")), {})

    made.start(lambda _: None, SimpleNamespace(draft_worker=None))

    assert isinstance(made.worker._reloads._swap, UnprovedDraft) is is_sender


class App:
    """Has middleware, as FastAPI has."""

    def __init__(self) -> None:
        self.user_middleware: list[Any] = []

    def add_middleware(self, kind: Any, **options: Any) -> None:
        self.user_middleware.append(SimpleNamespace(cls=kind, **options))


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """That of a process in which the plugin has not been registered yet."""
    for name in ("SERVER", "SECRET", "HTTP_APP", "SOCKET", "API_KEYS_FILE"):
        monkeypatch.setenv(f"UPDRAFT_SGLANG_{name}", "left by this test")  # so that it is put back
        monkeypatch.delenv(f"UPDRAFT_SGLANG_{name}")
    monkeypatch.setenv(names.APP_PATH, "app_of_sglang:app")
    plugin.http_process.cache_clear()
    yield monkeypatch
    plugin.http_process.cache_clear()


def test_each_of_several_http_processes_tells_of_its_hooks_and_knows_the_admin_key(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They import the application that the environment names, and SGLang loads no plugin in them."""
    environment.setenv("UPDRAFT_SGLANG_SOCKET", str(tmp_path / "socket"))
    registry = SimpleNamespace(register=lambda *_: None)
    stock = App()
    modules = {
        "sglang": ModuleType("sglang"),
        "sglang.srt": ModuleType("sglang.srt"),
        "sglang.srt.plugins": SimpleNamespace(load_plugins=plugin.register),
        "sglang.srt.plugins.hook_registry": SimpleNamespace(HookRegistry=registry, HookType=SimpleNamespace(AROUND=1)),
        "app_of_sglang": SimpleNamespace(app=stock),
        names.HTTP: SimpleNamespace(app=stock),
    }
    for name, module in modules.items():
        environment.setitem(sys.modules, name, module)
    plugin.register()  # in the main process, which names our application
    plugin.http_process.cache_clear()

    app = pkgutil.resolve_name(os.environ[names.APP_PATH])
    del sys.modules["updraft_sglang.worker_app"]  # it was imported with stand-ins
    manager = SimpleNamespace(server_args=SimpleNamespace(admin_api_key="secret-of-the-agent"))
    plugin.http_process().start(lambda _: None, manager)

    (door,) = app.user_middleware
    told = door.facts()["hooks"]
    assert names.ARGUMENTS in told
    assert all(told.values()), "no hook fits these stand-ins"
    assert door.rules.admin() == "secret-of-the-agent"


def test_with_settings_that_are_not_valid_and_no_keys_a_server_runs_without_the_plugin(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment.setenv("UPDRAFT_SGLANG_SOCKET", str(tmp_path / "socket"))
    environment.setenv("UPDRAFT_SGLANG_TOP_K", "no number")

    plugin.register()

    assert os.environ[names.APP_PATH] == "app_of_sglang:app", "its HTTP processes import SGLang's own application"


def test_a_server_that_should_require_keys_and_cannot_does_not_start(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment.setenv("UPDRAFT_SGLANG_API_KEYS_FILE", str(tmp_path / "missing"))

    with pytest.raises(SystemExit, match="API keys cannot be enforced: KeysError: cannot read"):
        plugin.register()
