"""The server's draft: what it holds after a hello, and swaps with a proof."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.tap_plugin import Process, process
from tests.support.tiny_target import make_draft, make_tiny_target, save_draft
from tests.support.wait import until

from updraft_chassis.errors import Corrupt, InvalidInput, Unavailable
from updraft_inference.engine import DraftCheckpoint, LoadedDraft, OtherShapeError, SwapResult, TargetChangedError
from updraft_inference.sidecar.assembly import Assembler, Ended
from updraft_inference.sidecar.attached import AttachedServer, Known
from updraft_inference.sidecar.link import Event, Link
from updraft_inference.tap.server_kind import VLLM
from updraft_tap import checkpoint, weights
from updraft_tap.drafting.speedup import Speedup


class Beside:
    """An agent's view of a server whose worker is the test's."""

    def __init__(self, path: Path, initial: Path | None = None, *, quantization: str = "") -> None:
        self.changes: list[LoadedDraft] = []
        self.link = Link(path, VLLM, Assembler(max_bytes=1), self._hear)
        self.server = AttachedServer(
            self.link,
            Known(fingerprints=("sha256:t", "sha256:k"), quantization=quantization, initial=initial),
            on_change=lambda: self.changes.append(self.server.loaded),
        )

    def _hear(self, event: Event) -> None:
        assert not isinstance(event, Ended)
        self.server.hear(event)


@pytest.fixture
async def beside(short_tmp_path: Path) -> AsyncIterator[Beside]:
    one = Beside(short_tmp_path / "s", initial=Path("/first"))
    async with one.link.listening():
        yield one


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> DraftCheckpoint:
    folder = tmp_path_factory.mktemp("drafts")
    target = make_tiny_target(folder / "target")
    digest = save_draft(make_draft(target), folder / "7")
    return DraftCheckpoint(version=7, folder=folder / "7", tensors_digest=digest)


def held(draft: DraftCheckpoint) -> str:
    """What a server in float32 holds of it, computed from the file as the plugin reads it."""
    _, tensors = checkpoint.read(draft.folder)
    return weights.digest({**weights.joined(tensors, torch.float32), "d2t": tensors["d2t"]})


async def worker(stack: AsyncExitStack, beside: Beside, **changed: Any) -> Process:
    changes = len(beside.changes)
    one = await stack.enter_async_context(process(beside.link.path, "worker", **changed))
    assert (await one.hear())["refusal"] == ""
    await until(lambda: len(beside.changes) > changes, what="the news of its hello")
    return one


Reply = Callable[[dict[str, Any]], dict[str, Any]]


def loaded(load: dict[str, Any], **changed: Any) -> dict[str, Any]:
    """The answer of a server that did as it was told."""
    served = {"version": load["version"], "digest": load["digest"]}
    answer = {"kind": "loaded", "number": 1, "dropped": 0, "version": load["version"], "refusal": "", "held": ""}
    return answer | {"pause_us": 1500, "target": "sha256:target", "served": served} | changed


async def swapped(
    beside: Beside, one: Process, draft: DraftCheckpoint | None, *answers: Reply
) -> tuple[SwapResult, dict[str, Any]]:
    """The result of a swap whose load the worker answers, and the load."""

    async def answer() -> dict[str, Any]:
        load = await one.hear()
        for reply in answers:
            await one.say(reply(load))
        if not answers:
            one.hang_up()
        return load

    result, load = await asyncio.gather(beside.server.swap(draft), answer())
    return result, load


@pytest.mark.parametrize(("of_files", "known"), [("mxfp4", "mxfp4"), ("", "fp8")])
async def test_a_server_that_quantizes_the_target_itself_says_so(
    short_tmp_path: Path, of_files: str, known: str
) -> None:
    one = Beside(short_tmp_path / "s", quantization=of_files)
    async with one.link.listening(), process(one.link.path, "worker", quantization="fp8"):
        await one.server.met.wait()

    assert one.server.info.quantization == known


async def test_a_hello_says_which_draft_the_server_holds(beside: Beside) -> None:
    async with AsyncExitStack() as stack:
        await worker(stack, beside, version=3, digest="sha256:3")

    assert beside.server.loaded == LoadedDraft(version=3, tensors_digest="sha256:3")
    assert beside.server.info.engine == "vllm/0.32.0"


async def test_the_device_is_the_servers_and_unknown_before_it_says_so(beside: Beside) -> None:
    assert beside.server.device == ""
    async with AsyncExitStack() as stack:
        await worker(stack, beside, device="cuda:0")
        assert beside.server.device == "cuda:0"


async def test_a_server_that_restarted_holds_nothing_and_that_is_news(beside: Beside) -> None:
    async with AsyncExitStack() as stack:
        first = await worker(stack, beside, version=3, digest="sha256:3")
        first.hang_up()
        await until(lambda: not beside.link._connections, what="its end")
        await worker(stack, beside, id="worker-2", server="two")

    assert beside.changes == [LoadedDraft(version=3, tensors_digest="sha256:3"), LoadedDraft()]


async def test_a_server_counts_as_met_once_the_process_that_leads_its_ranks_is_there_too(beside: Beside) -> None:
    async with AsyncExitStack() as stack:
        for _ in range(2):
            async with AsyncExitStack() as short:
                await worker(short, beside, loader="scheduler", ranks={"tensor": 2})
            await until(lambda: not beside.link._connections, what="its end")
        await worker(stack, beside, loader="scheduler", ranks={"tensor": 2})
        assert not beside.server.met.is_set()
        await stack.enter_async_context(process(beside.link.path, "scheduler"))
        await beside.server.met.wait()

    assert beside.server.info.engine == "vllm/0.32.0"


async def test_a_server_whose_leader_is_not_there_yet_is_asked_again_when_it_comes(
    beside: Beside, draft: DraftCheckpoint
) -> None:
    async with AsyncExitStack() as stack:
        await worker(stack, beside, loader="scheduler", ranks={"tensor": 2}, dtype="f32")
        with pytest.raises(Unavailable, match="the vLLM server is not connected"):
            await beside.server.swap(draft)
        changes = len(beside.changes)
        leader = await stack.enter_async_context(process(beside.link.path, "scheduler"))
        assert (await leader.hear())["refusal"] == ""
        await until(lambda: len(beside.changes) > changes, what="the news")
        result, _ = await swapped(beside, leader, draft, lambda load: loaded(load, held=held(draft)))

    assert result.loaded.version == 7


@pytest.mark.parametrize("leaves", [False, True])
async def test_a_load_goes_to_the_process_that_leads_several_ranks(
    beside: Beside, draft: DraftCheckpoint, *, leaves: bool
) -> None:
    async with AsyncExitStack() as stack:
        first = await worker(stack, beside, loader="scheduler", ranks={"tensor": 2}, dtype="f32")
        leader = await stack.enter_async_context(process(beside.link.path, "scheduler"))
        assert (await leader.hear())["refusal"] == ""
        await until(lambda: "scheduler" in beside.server._roles, what="its hello")
        if leaves:

            def hang_up(load: dict[str, Any]) -> dict[str, Any]:
                first.hang_up()
                return loaded(load, version=6)  # no answer to this load

            async def leave() -> None:
                await until(lambda: "worker" not in beside.server._roles, what="the end of the worker")
                leader.hang_up()

            async with asyncio.TaskGroup() as leaving:
                leaving.create_task(leave())
                with pytest.raises(Unavailable, match="the vLLM server went away"):
                    await swapped(beside, leader, draft, hang_up)
        else:
            result, _ = await swapped(beside, leader, draft, lambda load: loaded(load, held=held(draft)))
            assert result.loaded == LoadedDraft(version=7, tensors_digest=draft.tensors_digest)


async def test_the_speedup_is_that_of_the_draft_that_the_server_holds(beside: Beside) -> None:
    async with AsyncExitStack() as stack:
        await worker(stack, beside, version=3, digest="sha256:3")
        scheduler = await stack.enter_async_context(process(beside.link.path, "scheduler"))
        assert (await scheduler.hear())["refusal"] == ""
        loads = [[0, 1.3, 1.2, 1.4], [8, 0.9, 0.8, 1.0]]
        said = {"kind": "speedup", "number": 1, "dropped": 0, "version": 3, "loads": loads}
        await scheduler.say(said)
        await until(lambda: bool(beside.server.speedups), what="the speedup")
        assert beside.server.speedups == {0: Speedup(1.3, 1.2, 1.4), 8: Speedup(0.9, 0.8, 1.0)}
        await scheduler.say({**said, "number": 2, "version": 4})
        await until(lambda: not beside.server.speedups, what="that of another draft")
        await scheduler.say({**said, "number": 3})
        await until(lambda: bool(beside.server.speedups), what="the speedup again")
        scheduler.hang_up()
        await until(lambda: not beside.server.speedups, what="the end of the scheduler")


async def test_a_swap_is_proved_by_the_digest_of_what_the_server_holds(beside: Beside, draft: DraftCheckpoint) -> None:
    async with AsyncExitStack() as stack:
        one = await worker(stack, beside)
        of_earlier_load: Reply = lambda load: loaded(load, version=6)  # noqa: E731 - one of two
        result, load = await swapped(beside, one, draft, of_earlier_load, lambda load: loaded(load, held=held(draft)))

    assert (load["folder"], load["version"], load["digest"]) == (str(draft.folder), 7, draft.tensors_digest)
    assert (result.pause_s, result.target) == (0.0015, "sha256:target")
    assert result.loaded == beside.server.loaded == LoadedDraft(version=7, tensors_digest=draft.tensors_digest)


async def test_a_server_that_holds_something_else_is_not_believed(beside: Beside, draft: DraftCheckpoint) -> None:
    async with AsyncExitStack() as stack:
        one = await worker(stack, beside)
        with pytest.raises(Corrupt, match="the server holds sha256:else"):
            await swapped(beside, one, draft, lambda load: loaded(load, held="sha256:else"))

    assert beside.server.loaded == LoadedDraft(version=7, tensors_digest="sha256:else")


async def test_a_swap_that_changed_the_target_is_a_fault_and_no_passing_refusal(
    beside: Beside, draft: DraftCheckpoint
) -> None:
    before = {"version": 3, "digest": "sha256:3"}
    async with AsyncExitStack() as stack:
        one = await worker(stack, beside, **before)
        refused: Reply = lambda load: loaded(load, refusal="it is changed", target_changed=True, served=before)  # noqa: E731
        with pytest.raises(TargetChangedError, match="refused version 7: it is changed"):
            await swapped(beside, one, draft, refused)

    assert beside.server.loaded == LoadedDraft(version=3, tensors_digest="sha256:3")


async def test_a_refusal_keeps_the_draft_before_and_says_why(beside: Beside, draft: DraftCheckpoint) -> None:
    before = {"version": 3, "digest": "sha256:3"}
    async with AsyncExitStack() as stack:
        one = await worker(stack, beside, **before)
        with pytest.raises(Unavailable, match="refused version 7: it does not fit"):
            await swapped(beside, one, draft, lambda load: loaded(load, refusal="it does not fit", served=before))

    assert beside.server.loaded == LoadedDraft(version=3, tensors_digest="sha256:3")


@pytest.mark.parametrize(
    "changed",
    [
        {"served": 3},
        {"served": None},
        {"served": {"version": 1 << 32, "digest": ""}},
        {"served": {"version": -1, "digest": ""}},
        {"pause_us": 1 << 80},
        {"held": 3},
        {"version": None, "served": None},
    ],
)
async def test_a_malformed_answer_is_a_refusal(beside: Beside, draft: DraftCheckpoint, changed: dict[str, Any]) -> None:
    async with AsyncExitStack() as stack:
        one = await worker(stack, beside)
        with pytest.raises(Unavailable, match="malformed"):
            await swapped(beside, one, draft, lambda load: {**loaded(load), **changed})

    assert beside.server.loaded == LoadedDraft()


async def test_for_a_draft_of_another_shape_the_server_must_restart_and_is_asked_once(
    beside: Beside, draft: DraftCheckpoint
) -> None:
    misfit: Reply = lambda load: loaded(  # noqa: E731 - a reply
        load, refusal="hidden_size is 9", needs_restart=True, served={"version": 0, "digest": ""}
    )
    async with AsyncExitStack() as stack:
        one = await worker(stack, beside)
        with pytest.raises(OtherShapeError, match=f"hidden_size is 9; restart it with the draft in {draft.folder}"):
            await swapped(beside, one, draft, misfit)
        with pytest.raises(OtherShapeError, match="hidden_size is 9"):
            await beside.server.swap(draft)
        assert [message["kind"] for message in one.heard] == ["answer", "load"]

        one.hang_up()
        again = await worker(stack, beside, server="two")
        result, _ = await swapped(beside, again, draft, lambda load: loaded(load, held=held(draft)))

    assert result.loaded.version == 7, "the server that restarted fits"


OTHER_SHAPE = {"refusal": "hidden_size is 9", "needs_restart": True, "served": {"version": 0, "digest": ""}}


async def test_a_server_that_updraft_started_restarts_with_a_draft_of_another_shape(
    beside: Beside, draft: DraftCheckpoint
) -> None:
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as answering:
        one = await worker(stack, beside)

        async def restart(folder: Path) -> Path:
            assert folder == draft.folder
            one.hang_up()
            again = await worker(stack, beside, server="two")
            answering.create_task(prove(again))
            return Path("/kept")

        async def prove(again: Process) -> None:
            load = await again.hear()
            await again.say(loaded(load, held=held(draft)))

        beside.server.restart = restart
        result, _ = await swapped(beside, one, draft, lambda load: loaded(load, **OTHER_SHAPE))

    assert result.loaded == LoadedDraft(version=7, tensors_digest=draft.tensors_digest)


async def test_a_server_of_several_ranks_has_restarted_once_the_process_that_leads_them_is_there(
    beside: Beside, draft: DraftCheckpoint
) -> None:
    ranks: dict[str, Any] = {"loader": "scheduler", "ranks": {"tensor": 2}}
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as answering:
        one = await worker(stack, beside, **ranks)
        leader = await stack.enter_async_context(process(beside.link.path, "scheduler"))
        assert (await leader.hear())["refusal"] == ""
        await beside.server.met.wait()

        async def restart(_: Path) -> Path:
            leader.hang_up()
            one.hang_up()
            await until(lambda: not beside.link._connections, what="the end of both")
            await worker(stack, beside, server="two", **ranks)
            answering.create_task(lead())
            return Path("/kept")

        async def lead() -> None:
            again = await stack.enter_async_context(process(beside.link.path, "scheduler", server="two"))
            assert (await again.hear())["refusal"] == ""
            load = await again.hear()
            await again.say(loaded(load, held=held(draft)))

        beside.server.restart = restart
        result, _ = await swapped(beside, leader, draft, lambda load: loaded(load, **OTHER_SHAPE))

    assert result.loaded == LoadedDraft(version=7, tensors_digest=draft.tensors_digest)


async def test_a_draft_with_which_the_server_does_not_start_twice_is_refused(
    beside: Beside, draft: DraftCheckpoint
) -> None:
    async def restart(_: Path) -> Path:
        raise Unavailable("out of memory")

    beside.server.restart = restart
    async with AsyncExitStack() as stack:
        one = await worker(stack, beside)
        for error in (Unavailable, InvalidInput):
            with pytest.raises(error, match="does not start with version 7: out of memory"):
                await swapped(beside, one, draft, lambda load: loaded(load, **OTHER_SHAPE))


async def test_a_server_that_cannot_swap_says_only_why(beside: Beside, draft: DraftCheckpoint) -> None:
    async with AsyncExitStack() as stack:
        one = await worker(stack, beside)
        why = {"kind": "loaded", "number": 1, "dropped": 0, "version": 7, "refusal": "compiled weights"}
        with pytest.raises(Unavailable, match="refused version 7: compiled weights"):
            await swapped(beside, one, draft, lambda _: why)


async def test_a_server_that_goes_away_in_a_swap_ends_it(beside: Beside, draft: DraftCheckpoint) -> None:
    async with AsyncExitStack() as stack:
        one = await worker(stack, beside)
        with pytest.raises(Unavailable, match="went away"):
            await swapped(beside, one, draft)


async def test_without_a_server_a_swap_waits_for_one(beside: Beside, draft: DraftCheckpoint) -> None:
    with pytest.raises(Unavailable, match="not connected"):
        await beside.server.swap(draft)


async def test_a_damaged_draft_never_reaches_the_server(beside: Beside, draft: DraftCheckpoint) -> None:
    wrong = DraftCheckpoint(version=7, folder=draft.folder, tensors_digest="sha256:other")
    missing = DraftCheckpoint(version=8, folder=draft.folder.parent / "8", tensors_digest="")
    async with AsyncExitStack() as stack:
        one = await worker(stack, beside)
        with pytest.raises(Corrupt):
            await beside.server.swap(wrong)
        with pytest.raises((Corrupt, InvalidInput)):
            await beside.server.swap(missing)
        assert len(one.heard) == 1


async def test_no_version_is_the_draft_that_the_server_started_with(beside: Beside) -> None:
    async with AsyncExitStack() as stack:
        one = await worker(stack, beside)
        assert (await beside.server.swap(None)).loaded == LoadedDraft()
        assert len(one.heard) == 1, "it holds that already"
        one.hang_up()
        again = await worker(stack, beside, version=3, digest="sha256:3")
        result, load = await swapped(beside, again, None, lambda load: loaded(load, held="sha256:first"))

    assert (load["folder"], load["version"], load["digest"]) == ("/first", 0, "")
    assert result.loaded == LoadedDraft()


async def test_a_draft_that_the_server_lost_is_not_the_first_one_which_is_loaded_again(beside: Beside) -> None:
    async with AsyncExitStack() as stack:
        one = await worker(stack, beside, version=0, digest=weights.UNKNOWN)
        assert beside.server.loaded != LoadedDraft()
        result, load = await swapped(beside, one, None, lambda load: loaded(load, held="sha256:first"))

    assert (load["folder"], load["version"]) == ("/first", 0)
    assert result.loaded == beside.server.loaded == LoadedDraft()


async def test_without_a_first_draft_only_a_restart_gives_no_version(short_tmp_path: Path) -> None:
    one = Beside(short_tmp_path / "s")
    async with one.link.listening(), AsyncExitStack() as stack:
        await worker(stack, one, version=3, digest="sha256:3")
        with pytest.raises(Unavailable, match="set UPDRAFT_INFERENCE_INITIAL_DRAFT to that draft's folder"):
            await one.server.swap(None)
