"""Swaps and starts over a server that fails in ways that a real one does not on demand."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.contract.engine_contract import asking, whole
from tests.support.sglang_server import ADMIN, CONTEXT, FakeSglang, saved_draft
from tests.support.tiny_target import DRAFT_VOCAB, make_tiny_target
from tests.support.wait import until
from torch import arange

from updraft_artifacts.sizing import running_bytes
from updraft_chassis.errors import Corrupt, Forbidden, InvalidInput, Unavailable
from updraft_inference.engine import DraftCheckpoint, OtherShapeError, RestartNeededError
from updraft_inference.sglang_engine import server as servers
from updraft_inference.sglang_engine.engine import SglangEngine, SglangOptions, opened
from updraft_inference.sglang_engine.server import SglangServer


class TestSwaps:
    async def test_a_swap_is_proved_and_told_in_the_registrys_words(
        self, fake: FakeSglang, engine: SglangEngine, drafts: list[DraftCheckpoint], options: SglangOptions
    ) -> None:
        assert (engine.loaded.version, engine.loaded.tensors_digest) == (0, "")
        for draft in drafts:
            swapped = await engine.swap(draft)

            assert (swapped.loaded.version, swapped.loaded.tensors_digest) == (draft.version, draft.tensors_digest)
            assert swapped.pause_s > 0
        await engine.swap(None)
        assert (engine.loaded.version, engine.loaded.tensors_digest) == (0, "")
        assert fake.label == "v0"
        assert not fake.is_paused
        assert not fake.has_session
        assert not options.note.exists()

    async def test_what_the_server_only_says_it_loaded_is_found_out_and_undone(
        self, fake: FakeSglang, engine: SglangEngine, drafts: list[DraftCheckpoint]
    ) -> None:
        await engine.swap(drafts[0])
        held = dict(fake.held)
        fake.is_lying = True

        with pytest.raises(Corrupt, match="holds something else"):
            await engine.swap(drafts[1])

        assert engine.loaded.version == 1
        assert (fake.held, fake.label) == (held, "v1")
        assert not fake.is_paused

    async def test_a_damaged_load_is_undone_with_the_last_good_draft(
        self, fake: FakeSglang, engine: SglangEngine, drafts: list[DraftCheckpoint]
    ) -> None:
        await engine.swap(drafts[0])
        held, fake.damages = dict(fake.held), 1

        with pytest.raises(Corrupt, match=r"model\.norm"):
            await engine.swap(drafts[1])

        assert fake.held == held
        assert engine.loaded.tensors_digest == drafts[0].tensors_digest

    async def test_where_undoing_fails_too_nothing_good_is_claimed(
        self, fake: FakeSglang, engine: SglangEngine, drafts: list[DraftCheckpoint]
    ) -> None:
        await engine.swap(drafts[0])
        fake.damages = 2

        with pytest.raises(Corrupt):
            await engine.swap(drafts[1])

        assert engine.loaded.tensors_digest not in {drafts[0].tensors_digest, drafts[1].tensors_digest, ""}
        assert not fake.is_paused
        assert (await engine.swap(drafts[0])).loaded.tensors_digest == drafts[0].tensors_digest

    @pytest.mark.parametrize("path", ["/update_weights_from_tensor", "/weights_checker", "/pause_generation"])
    async def test_what_the_server_refuses_says_nothing_about_the_draft(
        self, fake: FakeSglang, engine: SglangEngine, drafts: list[DraftCheckpoint], path: str
    ) -> None:
        fake.refusals[path] = ["cannot"]

        with pytest.raises(Unavailable, match="cannot"):
            await engine.swap(drafts[0])

        assert engine.loaded.version == 0
        assert not fake.is_paused
        assert not fake.has_session
        await engine.swap(drafts[0])

    async def test_what_the_loader_refuses_and_is_sound_here_is_no_fault_of_the_draft(
        self, fake: FakeSglang, engine: SglangEngine, drafts: list[DraftCheckpoint]
    ) -> None:
        await engine.swap(drafts[0])
        fake.refusals["/update_weights_from_tensor"] = ["fc.weight is none"]

        with pytest.raises(Unavailable, match=r"SGLang refuses /update_weights_from_tensor: fc\.weight is none"):
            await engine.swap(drafts[1])

        assert engine.loaded.tensors_digest == drafts[0].tensors_digest
        assert not fake.is_paused
        assert not fake.has_session

    async def test_a_refusal_stands_where_its_session_cannot_be_ended_at_once(
        self, fake: FakeSglang, engine: SglangEngine, drafts: list[DraftCheckpoint]
    ) -> None:
        fake.refusals["/update_weights_from_tensor"] = ["fc.weight has another shape"]
        fake.refusals["/end_weight_update"] = ["not now"]

        with pytest.raises(Unavailable, match="another shape"):
            await engine.swap(drafts[0])

        await engine.swap(drafts[1])
        assert engine.loaded.version == drafts[1].version
        assert not fake.has_session

    async def test_a_server_that_does_not_go_on_at_once_is_asked_again(
        self, fake: FakeSglang, engine: SglangEngine, drafts: list[DraftCheckpoint]
    ) -> None:
        fake.refusals["/continue_generation"] = ["not yet"]

        await engine.swap(drafts[0])

        assert not fake.is_paused

    async def test_our_own_pause_that_the_server_would_not_end_is_ended_by_the_next_swap(
        self, fake: FakeSglang, engine: SglangEngine, drafts: list[DraftCheckpoint], options: SglangOptions
    ) -> None:
        options.note.touch()  # as it is left when all tries to go on have failed
        fake.is_paused = fake.has_session = True

        await engine.swap(drafts[0])

        assert engine.loaded.version == 1
        assert not fake.is_paused
        assert not options.note.exists()

    async def test_a_session_that_the_server_did_not_end_is_ended_before_the_next_begins(
        self, fake: FakeSglang, engine: SglangEngine, drafts: list[DraftCheckpoint], options: SglangOptions
    ) -> None:
        fake.refusals["/end_weight_update"] = ["busy"]
        with pytest.raises(Unavailable, match="busy"):
            await engine.swap(drafts[0])

        await engine.swap(drafts[0])

        assert engine.loaded.version == 1
        assert not fake.has_session
        assert not options.note.exists()

    async def test_somebody_elses_pause_is_not_ended_for_a_session_that_a_swap_left(
        self, fake: FakeSglang, engine: SglangEngine, drafts: list[DraftCheckpoint], options: SglangOptions
    ) -> None:
        fake.refusals["/end_weight_update"] = ["busy"]
        with pytest.raises(Unavailable, match="busy"):
            await engine.swap(drafts[0])
        fake.is_paused = True

        with pytest.raises(Unavailable, match="paused by someone else"):
            await engine.swap(drafts[0])

        assert fake.is_paused
        fake.is_paused = False
        await engine.swap(drafts[0])
        assert engine.loaded.version == 1
        assert not fake.has_session
        assert not options.note.exists()

    async def test_a_session_that_an_agent_left_is_ended_by_the_next_one_within_a_pause(
        self, fake: FakeSglang, drafts: list[DraftCheckpoint], options: SglangOptions
    ) -> None:
        options.note.write_text("resumed")
        fake.has_session = True
        async with SglangServer(fake.url, admin_key=ADMIN) as server, opened(options, server, lambda _: None) as engine:
            assert "/end_weight_update" not in fake.calls
            await engine.swap(drafts[0])

        assert fake.calls.index("/pause_generation") < fake.calls.index("/end_weight_update")
        assert not fake.has_session
        assert not options.note.exists()

    async def test_somebody_elses_pause_is_not_ended(
        self, fake: FakeSglang, engine: SglangEngine, drafts: list[DraftCheckpoint]
    ) -> None:
        fake.is_paused = True
        fake.calls.clear()

        with pytest.raises(Unavailable, match="paused by someone else"):
            await engine.swap(drafts[0])

        assert fake.is_paused
        assert set(fake.calls) <= {"/ready", "/ping"}

    async def test_a_server_that_remembers_a_failed_health_check_and_answers_is_not_called_paused(
        self, fake: FakeSglang, engine: SglangEngine, drafts: list[DraftCheckpoint]
    ) -> None:
        fake.is_unhealthy = True

        await engine.swap(drafts[0])

        assert engine.loaded.version == 1

    async def test_a_busy_server_that_remembers_a_failed_health_check_is_known_by_the_requests_that_get_on(
        self, fake: FakeSglang, engine: SglangEngine, drafts: list[DraftCheckpoint], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(servers, "_TAKEN_S", 1.0)
        fake.may_step.clear()
        deltas = engine.generate(asking("a"))
        await anext(deltas)
        fake.is_unhealthy = fake.is_full = True
        async with asyncio.TaskGroup() as tasks:
            swap = tasks.create_task(engine.swap(drafts[0]))
            await until(lambda: fake.calls.count("/generate") == 2, what="the question for a token")
            fake.may_step.set()
            await swap

        assert engine.loaded.version == 1
        fake.is_full = False
        await deltas.aclose()

    async def test_somebody_elses_pause_of_an_unhealthy_server_is_not_ended_either(
        self, fake: FakeSglang, engine: SglangEngine, drafts: list[DraftCheckpoint], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(servers, "_TAKEN_S", 0.2)
        fake.may_step.clear()
        deltas = engine.generate(asking("a"))
        await anext(deltas)
        fake.is_unhealthy = fake.is_paused = True

        async def leave() -> None:
            await until(lambda: fake.calls.count("/generate") == 2, what="the question for a token")
            await deltas.aclose()  # whose end is told also by a server that is paused

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(leave())
            with pytest.raises(Unavailable, match="unhealthy and generated no token"):
                await engine.swap(drafts[0])

        assert fake.aborted
        assert fake.is_paused
        assert "/pause_generation" not in fake.calls
        fake.is_paused = False

    async def test_somebody_elses_session_is_not_closed(
        self, fake: FakeSglang, engine: SglangEngine, drafts: list[DraftCheckpoint]
    ) -> None:
        fake.has_session = True

        with pytest.raises(Unavailable, match="another weight update"):
            await engine.swap(drafts[0])

        assert fake.has_session
        assert not fake.is_paused
        assert engine.loaded.version == 0

    async def test_a_swap_whose_caller_is_cancelled_still_ends(
        self, fake: FakeSglang, engine: SglangEngine, drafts: list[DraftCheckpoint]
    ) -> None:
        fake.may_update.clear()
        async with asyncio.TaskGroup() as tasks:
            swap = tasks.create_task(engine.swap(drafts[0]))
            await until(lambda: fake.has_session, what="the session")
            swap.cancel()
            await asyncio.sleep(0)
            fake.may_update.set()

        assert swap.cancelled()
        assert not fake.is_paused
        assert not fake.has_session
        assert engine.loaded.version == 1

    async def test_what_changed_at_the_server_is_found(
        self, fake: FakeSglang, engine: SglangEngine, drafts: list[DraftCheckpoint]
    ) -> None:
        held = (await engine.swap(drafts[0])).loaded
        assert await engine.rehash() == held
        fake.held["draft.lm_head.weight"] = "0" * 16

        rehashed = await engine.rehash()

        assert rehashed.version == 1
        assert rehashed.tensors_digest != held.tensors_digest
        assert engine.loaded == rehashed

    async def test_a_draft_of_another_vocabulary_is_served_and_its_map_proved(
        self, fake: FakeSglang, models: Path, engine: SglangEngine, drafts: list[DraftCheckpoint]
    ) -> None:
        other = saved_draft(models, 8, token_ids=arange(DRAFT_VOCAB) + 1)

        assert (await engine.swap(other)).loaded.tensors_digest == other.tensors_digest
        fake.held["draft.hot_token_id"] = "0" * 16
        assert (await engine.rehash()).tensors_digest != other.tensors_digest
        assert (await engine.swap(drafts[0])).loaded.version == 1

    async def test_a_draft_of_another_size_waits_for_a_restart_and_is_not_refused(
        self, models: Path, engine: SglangEngine
    ) -> None:
        other = saved_draft(models, 8, token_ids=arange(DRAFT_VOCAB - 1))

        with pytest.raises(
            OtherShapeError, match=r"another shape .* restart the server with --speculative-draft-model"
        ):
            await engine.swap(other)

    async def test_a_server_that_does_not_show_its_map_is_not_given_another(
        self, fake: FakeSglang, models: Path, options: SglangOptions, drafts: list[DraftCheckpoint]
    ) -> None:
        fake.exchanges_vocabulary = False
        fake.load(fake.seed)
        other = saved_draft(models, 8, token_ids=arange(DRAFT_VOCAB) + 1)

        async with SglangServer(fake.url, admin_key=ADMIN) as server, opened(options, server, lambda _: None) as engine:
            assert (await engine.swap(drafts[0])).loaded.version == 1
            with pytest.raises(RestartNeededError, match=r"another vocabulary .* restart the server") as raised:
                await engine.swap(other)
        assert not isinstance(raised.value, OtherShapeError), "other sizes would not help"

    async def test_a_draft_that_is_not_what_its_manifest_says_is_refused_before_any_pause(
        self, fake: FakeSglang, engine: SglangEngine, drafts: list[DraftCheckpoint]
    ) -> None:
        fake.calls.clear()

        with pytest.raises(Corrupt):
            await engine.swap(replace(drafts[0], tensors_digest="sha256:0"))

        assert not fake.calls


class TestStart:
    async def refused(self, fake: FakeSglang, options: SglangOptions, key: str = ADMIN) -> str:
        with pytest.raises((InvalidInput, Forbidden)) as refusal:
            async with SglangServer(fake.url, admin_key=key) as server, opened(options, server, lambda _: None):
                pass
        return str(refusal.value)

    @pytest.mark.parametrize(
        ("info", "sentence"),
        [
            ({"version": "0.5.20"}, "SGLang 0.5.20 is too old"),
            ({"version": "dev"}, "not a release of SGLang"),
            ({"speculative_algorithm": None}, "--speculative-algorithm EAGLE3 (it has none)"),
            ({"speculative_eagle_topk": 4}, "--speculative-eagle-topk 1"),
            ({"custom_weight_loader": None}, "--custom-weight-loader updraft_sglang.weights.load"),
            ({"dp_size": 2}, "--dp-size 1"),
            ({"speculative_draft_model_path": "/nowhere"}, "prepare-sglang"),
            ({"model_path": "/nowhere"}, "is not visible here"),
            ({"tp_size": None}, "missing required fields"),
        ],
    )
    async def test_a_server_that_cannot_be_served_with_is_refused_with_what_to_change(
        self, fake: FakeSglang, options: SglangOptions, info: dict[str, Any], sentence: str
    ) -> None:
        fake.info = info

        assert sentence in await self.refused(fake, options)

    async def test_a_server_of_another_model_is_refused(
        self, fake: FakeSglang, options: SglangOptions, tmp_path: Path
    ) -> None:
        fake.info = {"model_path": str(make_tiny_target(tmp_path / "other", seed=5))}

        assert "not the same model" in await self.refused(fake, options)

    async def test_a_wrong_admin_key_is_told_at_the_start(self, fake: FakeSglang, options: SglangOptions) -> None:
        assert "UPDRAFT_INFERENCE_SGLANG_ADMIN_KEY" in await self.refused(fake, options, key="another")

    async def test_the_identity_is_the_model_folders_and_the_limits_are_the_servers(self, engine: SglangEngine) -> None:
        info = engine.info

        assert info.engine == "sglang/0.5.23"
        assert (info.max_context, info.num_slots, info.vocab_size) == (CONTEXT, 2, 512)
        assert info.eos_token_ids == {2}

    async def test_there_is_memory_for_the_rows_of_as_many_requests_as_the_server_runs(
        self, fake: FakeSglang, options: SglangOptions
    ) -> None:
        fake.info = {"max_running_requests": 256}
        for chosen, expected in ((None, running_bytes(256)), (5_000_000, 5_000_000)):
            wanted = replace(options, max_captured_bytes=chosen)
            async with (
                SglangServer(fake.url, admin_key=ADMIN) as server,
                opened(wanted, server, lambda _: None) as engine,
            ):
                assert engine.info.num_slots == 256
                assert engine._collector._max_bytes == expected

    async def test_no_request_goes_beyond_the_models_positions(self, fake: FakeSglang, options: SglangOptions) -> None:
        fake.info = {"max_req_input_len": 5000}

        async with SglangServer(fake.url, admin_key=ADMIN) as server, opened(options, server, lambda _: None) as engine:
            assert engine.info.max_context == 1024
        refusal = await self.refused(fake, replace(options, max_context=1025))
        assert "a context of 1025 exceeds the model's 1024 positions" in refusal

    async def test_a_pause_that_an_agent_died_in_is_ended(self, fake: FakeSglang, options: SglangOptions) -> None:
        options.note.touch()
        fake.is_paused = fake.has_session = True

        async with SglangServer(fake.url, admin_key=ADMIN) as server, opened(options, server, lambda _: None):
            assert not fake.is_paused
            assert not fake.has_session
        assert not options.note.exists()

    async def test_a_pause_of_somebody_elses_leaves_an_unknown_draft_in_place_unproved_until_a_swap(
        self, fake: FakeSglang, options: SglangOptions, drafts: list[DraftCheckpoint]
    ) -> None:
        fake.load(drafts[0].folder)
        fake.is_paused = True

        async with SglangServer(fake.url, admin_key=ADMIN) as server, opened(options, server, lambda _: None) as engine:
            assert fake.is_paused
            assert (engine.loaded.version, engine.loaded.tensors_digest) == (0, "sha256:unproved")
            fake.is_paused = False

            assert (await engine.swap(None)).loaded.tensors_digest == ""
            assert (await engine.rehash()).tensors_digest == ""

    async def test_a_data_folder_that_is_not_there_yet_is_made_before_the_first_swap(
        self, fake: FakeSglang, options: SglangOptions, tmp_path: Path
    ) -> None:
        fake.held["draft.lm_head.weight"] = "0" * 16
        new = replace(options, note=tmp_path / "new" / "swap")

        async with SglangServer(fake.url, admin_key=ADMIN) as server, opened(new, server, lambda _: None) as engine:
            assert engine.loaded.version == 0

    async def test_a_data_folder_that_cannot_be_made_is_told(
        self, fake: FakeSglang, options: SglangOptions, tmp_path: Path
    ) -> None:
        (tmp_path / "file").touch()

        refusal = await self.refused(fake, replace(options, note=tmp_path / "file" / "swap"))

        assert "UPDRAFT_INFERENCE_DATA_DIR" in refusal

    async def test_weights_that_nobody_can_prove_are_replaced_by_the_first_draft(
        self, fake: FakeSglang, options: SglangOptions
    ) -> None:
        seed_hashes = dict(fake.held)
        fake.held["draft.lm_head.weight"] = "0" * 16

        async with SglangServer(fake.url, admin_key=ADMIN) as server, opened(options, server, lambda _: None) as engine:
            assert engine.loaded.version == 0
            assert fake.held == seed_hashes

    async def test_a_server_that_goes_away_ends_the_engine_and_its_requests(
        self, fake: FakeSglang, engine: SglangEngine
    ) -> None:
        fake.may_step.clear()
        deltas = engine.generate(asking("a"))
        await anext(deltas)
        fake.quit()

        with pytest.raises(Unavailable):
            async for _ in deltas:
                pass

        assert not engine.is_alive
        with pytest.raises(Unavailable, match="is gone"):
            await anext(engine.generate(asking("b")))
        fake.may_step.set()


class Slow(SglangServer):
    """Its first probe is answered when the test lets it, by silence."""

    def __init__(self, url: str) -> None:
        super().__init__(url, admin_key=ADMIN)
        self.is_asked, self.may_answer, self.has_answered = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def responds(self, timeout_s: float) -> bool:
        if self.has_answered.is_set():
            return await super().responds(timeout_s)
        self.is_asked.set()
        await self.may_answer.wait()
        self.has_answered.set()
        return False


async def test_a_draft_that_the_server_twice_does_not_start_with_is_refused_and_the_one_before_serves_again(
    fake: FakeSglang, models: Path, options: SglangOptions, drafts: list[DraftCheckpoint]
) -> None:
    other = saved_draft(models, 8, token_ids=arange(DRAFT_VOCAB - 1))
    started: list[Path] = []

    async def restart(folder: Path) -> None:
        started.append(folder)
        if folder == other.folder:
            raise Unavailable("the SGLang server ended with status 3")
        fake.load(fake.seed)

    async with (
        SglangServer(fake.url, admin_key=ADMIN) as server,
        opened(options, server, lambda _: None, restart=restart) as engine,
    ):
        held = (await engine.swap(drafts[0])).loaded
        for error in (Unavailable, InvalidInput):
            with pytest.raises(error, match=r"does not start with version 8: .* status 3"):
                await engine.swap(other)

        assert started == 2 * [other.folder, fake.seed]
        assert engine.loaded == held == await engine.rehash()
        await whole(engine, asking("a", max_tokens=3))


async def test_a_probe_that_a_restart_overtakes_does_not_end_the_engine(
    fake: FakeSglang, models: Path, options: SglangOptions
) -> None:
    other, has_ended = saved_draft(models, 8, token_ids=arange(DRAFT_VOCAB - 1)), False

    async def restart(folder: Path) -> None:
        nonlocal has_ended
        has_ended = True
        server.may_answer.set()
        probes = len(fake.calls)
        await until(lambda: "/ping" in fake.calls[probes:] or not engine.is_alive, what="the next probe")
        fake.seed, has_ended = folder, False
        fake.load(folder)

    async with (
        Slow(fake.url) as server,
        opened(options, server, lambda _: None, has_ended=lambda: has_ended, restart=restart) as engine,
    ):
        await server.is_asked.wait()
        swapped = await engine.swap(other)

        assert swapped.loaded.version == 8
        assert engine.is_alive
        await whole(engine, asking("a", max_tokens=3))
