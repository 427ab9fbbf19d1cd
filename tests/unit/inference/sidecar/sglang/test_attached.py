"""The draft of a server that fails in ways that a real one does not on demand: swaps, proofs, and what is found at a start."""

import asyncio
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.sglang_server import FakeSglang, saved_draft
from tests.support.tiny_target import DRAFT_VOCAB, make_tiny_target
from tests.support.wait import until
from tests.unit.inference.sidecar.sglang.conftest import Beside, greeting
from torch import arange

from updraft_chassis.errors import Corrupt, Unavailable
from updraft_inference.engine import (
    DraftCheckpoint,
    LoadedDraft,
    OtherShapeError,
    TargetChangedError,
)
from updraft_inference.sidecar.link import Gone
from updraft_inference.sidecar.sglang import server as servers
from updraft_inference.sidecar.sglang.attached import AttachedSglang
from updraft_tap.weights import UNKNOWN


class TestSwaps:
    async def test_a_swap_is_proved_and_told_in_the_registrys_words(
        self, fake: FakeSglang, server: AttachedSglang, drafts: list[DraftCheckpoint], beside: Beside
    ) -> None:
        assert (server.loaded.version, server.loaded.tensors_digest) == (0, "")
        for draft in drafts:
            swapped = await server.swap(draft)

            assert (swapped.loaded.version, swapped.loaded.tensors_digest) == (draft.version, draft.tensors_digest)
            assert swapped.pause_s > 0
        await server.swap(None)
        assert (server.loaded.version, server.loaded.tensors_digest) == (0, "")
        assert fake.label == "v0"
        assert not fake.is_paused
        assert not fake.has_session
        assert not beside.note.exists()

    async def test_all_ranks_have_prepared_a_draft_before_the_server_is_paused(
        self, fake: FakeSglang, server: AttachedSglang, drafts: list[DraftCheckpoint]
    ) -> None:
        fake.preparing = 2
        fake.calls.clear()

        await server.swap(drafts[0])

        assert fake.calls[fake.calls.index("/weights_checker") :] == [
            *["/weights_checker"] * 3,
            "/ready",
            *("/pause_generation", "/begin_weight_update", "/update_weights_from_tensor", "/end_weight_update"),
            *("/continue_generation", "/weights_checker"),
        ]

    async def test_a_pause_by_somebody_else_while_the_ranks_prepare_is_not_ended(
        self, fake: FakeSglang, server: AttachedSglang, drafts: list[DraftCheckpoint]
    ) -> None:
        fake.preparing, fake.paused_by_others = 2, 2
        fake.calls.clear()

        with pytest.raises(Unavailable, match="was paused by someone else"):
            await server.swap(drafts[0])

        assert fake.is_paused
        assert "/continue_generation" not in fake.calls

    async def test_a_plugin_of_another_release_is_told(
        self, fake: FakeSglang, server: AttachedSglang, drafts: list[DraftCheckpoint]
    ) -> None:
        fake.refusals["/weights_checker"] = ["Unsupported action='updraft_prepare'"]

        with pytest.raises(Unavailable, match="the server's plugin is of another release"):
            await server.swap(drafts[0])

    async def test_where_a_rank_refuses_to_prepare_a_draft_the_server_is_not_even_paused(
        self, fake: FakeSglang, server: AttachedSglang, drafts: list[DraftCheckpoint]
    ) -> None:
        held = (await server.swap(drafts[0])).loaded
        fake.refusals["/weights_checker"] = ["rank 1: fc.weight has another shape"]
        fake.calls.clear()

        with pytest.raises(Unavailable, match=r"rank 1: fc\.weight has another shape"):
            await server.swap(drafts[1])

        assert server.loaded == held
        assert "/pause_generation" not in fake.calls
        assert "/update_weights_from_tensor" not in fake.calls

    async def test_what_the_server_only_says_it_loaded_is_found_out_and_undone(
        self, fake: FakeSglang, server: AttachedSglang, drafts: list[DraftCheckpoint]
    ) -> None:
        await server.swap(drafts[0])
        held = dict(fake.held)
        fake.is_lying = True

        with pytest.raises(Corrupt, match="holds something else"):
            await server.swap(drafts[1])

        assert server.loaded.version == 1
        assert (fake.held, fake.label) == (held, "v1")
        assert not fake.is_paused

    async def test_a_damaged_load_is_undone_with_the_last_good_draft(
        self, fake: FakeSglang, server: AttachedSglang, drafts: list[DraftCheckpoint]
    ) -> None:
        await server.swap(drafts[0])
        held, fake.damages = dict(fake.held), 1

        with pytest.raises(Corrupt, match=r"model\.norm"):
            await server.swap(drafts[1])

        assert fake.held == held
        assert server.loaded.tensors_digest == drafts[0].tensors_digest

    async def test_a_swap_that_changes_the_targets_embedding_is_found_out_and_undone(
        self, fake: FakeSglang, server: AttachedSglang, drafts: list[DraftCheckpoint]
    ) -> None:
        before = await server.swap(drafts[0])
        fake.embedding = "another"

        changed = "loading version 2 changed the target's embedding; the target's weights may not be as before.*restart"
        for _ in range(2):
            with pytest.raises(TargetChangedError, match=changed):
                await server.swap(drafts[1])
            assert server.loaded == before.loaded

        fake.embedding = "the target's"
        assert (await server.swap(drafts[1])).target == before.target

    async def test_where_undoing_fails_too_nothing_good_is_claimed(
        self, fake: FakeSglang, server: AttachedSglang, drafts: list[DraftCheckpoint]
    ) -> None:
        await server.swap(drafts[0])
        fake.damages = 2

        with pytest.raises(Corrupt):
            await server.swap(drafts[1])

        assert server.loaded.tensors_digest not in {drafts[0].tensors_digest, drafts[1].tensors_digest, ""}
        assert not fake.is_paused
        assert (await server.swap(drafts[0])).loaded.tensors_digest == drafts[0].tensors_digest

    @pytest.mark.parametrize("path", ["/update_weights_from_tensor", "/weights_checker", "/pause_generation"])
    async def test_what_the_server_refuses_says_nothing_about_the_draft(
        self, fake: FakeSglang, server: AttachedSglang, drafts: list[DraftCheckpoint], path: str
    ) -> None:
        fake.refusals[path] = ["cannot"]

        with pytest.raises(Unavailable, match="cannot"):
            await server.swap(drafts[0])

        assert server.loaded.version == 0
        assert not fake.is_paused
        assert not fake.has_session
        await server.swap(drafts[0])

    async def test_what_the_loader_refuses_and_is_sound_here_is_no_fault_of_the_draft(
        self, fake: FakeSglang, server: AttachedSglang, drafts: list[DraftCheckpoint]
    ) -> None:
        await server.swap(drafts[0])
        fake.refusals["/update_weights_from_tensor"] = ["fc.weight is none"]

        with pytest.raises(Unavailable, match=r"SGLang refuses /update_weights_from_tensor: fc\.weight is none"):
            await server.swap(drafts[1])

        assert server.loaded.tensors_digest == drafts[0].tensors_digest
        assert not fake.is_paused
        assert not fake.has_session

    async def test_a_refusal_stands_where_its_session_cannot_be_ended_at_once(
        self, fake: FakeSglang, server: AttachedSglang, drafts: list[DraftCheckpoint]
    ) -> None:
        fake.refusals["/update_weights_from_tensor"] = ["fc.weight has another shape"]
        fake.refusals["/end_weight_update"] = ["not now"]

        with pytest.raises(Unavailable, match="another shape"):
            await server.swap(drafts[0])

        await server.swap(drafts[1])
        assert server.loaded.version == drafts[1].version
        assert not fake.has_session

    async def test_a_server_that_does_not_go_on_at_once_is_asked_again(
        self, fake: FakeSglang, server: AttachedSglang, drafts: list[DraftCheckpoint]
    ) -> None:
        fake.refusals["/continue_generation"] = ["not yet"]

        await server.swap(drafts[0])

        assert not fake.is_paused

    async def test_our_own_pause_that_the_server_would_not_end_is_ended_by_the_next_swap(
        self, fake: FakeSglang, server: AttachedSglang, drafts: list[DraftCheckpoint], beside: Beside
    ) -> None:
        beside.note.touch()  # as it is left when all tries to go on have failed
        fake.is_paused = fake.has_session = True

        await server.swap(drafts[0])

        assert server.loaded.version == 1
        assert not fake.is_paused
        assert not beside.note.exists()

    async def test_a_session_that_the_server_did_not_end_is_ended_before_the_next_begins(
        self, fake: FakeSglang, server: AttachedSglang, drafts: list[DraftCheckpoint], beside: Beside
    ) -> None:
        fake.refusals["/end_weight_update"] = ["busy"]
        with pytest.raises(Unavailable, match="busy"):
            await server.swap(drafts[0])

        await server.swap(drafts[0])

        assert server.loaded.version == 1
        assert not fake.has_session
        assert not beside.note.exists()

    async def test_somebody_elses_pause_is_not_ended_for_a_session_that_a_swap_left(
        self, fake: FakeSglang, server: AttachedSglang, drafts: list[DraftCheckpoint], beside: Beside
    ) -> None:
        fake.refusals["/end_weight_update"] = ["busy"]
        with pytest.raises(Unavailable, match="busy"):
            await server.swap(drafts[0])
        fake.is_paused = True

        with pytest.raises(Unavailable, match="paused by someone else"):
            await server.swap(drafts[0])

        assert fake.is_paused
        fake.is_paused = False
        await server.swap(drafts[0])
        assert server.loaded.version == 1
        assert not fake.has_session
        assert not beside.note.exists()

    async def test_a_session_that_an_agent_left_is_ended_by_the_next_one_within_a_pause(
        self, fake: FakeSglang, drafts: list[DraftCheckpoint], beside: Beside
    ) -> None:
        beside.note.write_text("resumed")
        fake.has_session = True
        async with beside.attached() as server:
            assert "/end_weight_update" not in fake.calls
            await server.swap(drafts[0])

        assert fake.calls.index("/pause_generation") < fake.calls.index("/end_weight_update")
        assert not fake.has_session
        assert not beside.note.exists()

    async def test_somebody_elses_pause_is_not_ended(
        self, fake: FakeSglang, server: AttachedSglang, drafts: list[DraftCheckpoint]
    ) -> None:
        fake.is_paused = True
        fake.calls.clear()

        with pytest.raises(Unavailable, match="paused by someone else"):
            await server.swap(drafts[0])

        assert fake.is_paused
        assert set(fake.calls) <= {"/ready", "/ping"}

    async def test_a_server_that_remembers_a_failed_health_check_and_answers_is_not_called_paused(
        self, fake: FakeSglang, server: AttachedSglang, drafts: list[DraftCheckpoint]
    ) -> None:
        fake.is_unhealthy = True

        await server.swap(drafts[0])

        assert server.loaded.version == 1

    async def test_somebody_elses_pause_of_an_unhealthy_server_is_not_ended_either(
        self, fake: FakeSglang, server: AttachedSglang, drafts: list[DraftCheckpoint], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(servers, "_TAKEN_S", 0.2)
        fake.is_unhealthy = fake.is_paused = True

        with pytest.raises(Unavailable, match="unhealthy and generated no token"):
            await server.swap(drafts[0])

        assert fake.is_paused
        assert "/pause_generation" not in fake.calls

    async def test_somebody_elses_session_is_not_closed(
        self, fake: FakeSglang, server: AttachedSglang, drafts: list[DraftCheckpoint]
    ) -> None:
        fake.has_session = True

        with pytest.raises(Unavailable, match="another weight update"):
            await server.swap(drafts[0])

        assert fake.has_session
        assert not fake.is_paused
        assert server.loaded.version == 0

    async def test_a_swap_whose_caller_is_cancelled_still_ends(
        self, fake: FakeSglang, server: AttachedSglang, drafts: list[DraftCheckpoint]
    ) -> None:
        fake.may_update.clear()
        async with asyncio.TaskGroup() as tasks:
            swap = tasks.create_task(server.swap(drafts[0]))
            await until(lambda: fake.has_session, what="the session")
            swap.cancel()
            await asyncio.sleep(0)
            fake.may_update.set()

        assert swap.cancelled()
        assert not fake.is_paused
        assert not fake.has_session
        assert server.loaded.version == 1

    async def test_what_changed_at_the_server_is_found(
        self, fake: FakeSglang, server: AttachedSglang, drafts: list[DraftCheckpoint]
    ) -> None:
        held = (await server.swap(drafts[0])).loaded
        assert await server.rehash() == held
        fake.held["draft.lm_head.weight"] = "0" * 16

        rehashed = await server.rehash()

        assert rehashed.version == 1
        assert rehashed.tensors_digest != held.tensors_digest
        assert server.loaded == rehashed

    async def test_a_draft_of_another_vocabulary_is_served_and_its_map_proved(
        self, fake: FakeSglang, models: Path, server: AttachedSglang, drafts: list[DraftCheckpoint]
    ) -> None:
        other = saved_draft(models, 8, token_ids=arange(DRAFT_VOCAB) + 1)

        assert (await server.swap(other)).loaded.tensors_digest == other.tensors_digest
        fake.held["draft.hot_token_id"] = "0" * 16
        assert (await server.rehash()).tensors_digest != other.tensors_digest
        assert (await server.swap(drafts[0])).loaded.version == 1

    async def test_a_draft_of_another_size_waits_for_a_restart_and_is_not_refused(
        self, models: Path, server: AttachedSglang
    ) -> None:
        other = saved_draft(models, 8, token_ids=arange(DRAFT_VOCAB - 1))

        with pytest.raises(
            OtherShapeError, match=r"another shape .* restart the server with --speculative-draft-model"
        ):
            await server.swap(other)

    async def test_a_draft_that_is_not_what_its_manifest_says_is_refused_before_any_pause(
        self, fake: FakeSglang, server: AttachedSglang, drafts: list[DraftCheckpoint]
    ) -> None:
        fake.calls.clear()

        with pytest.raises(Corrupt):
            await server.swap(replace(drafts[0], tensors_digest="sha256:0"))

        assert not fake.calls


class TestHello:
    @pytest.mark.parametrize(
        ("info", "sentence"),
        [
            ({"version": "0.5.20"}, "SGLang 0.5.20 is too old"),
            ({"version": "dev"}, "not a release of SGLang"),
            ({"speculative_algorithm": None}, r"--speculative-algorithm EAGLE3 \(it has none\)"),
            ({"speculative_eagle_topk": 4}, "--speculative-eagle-topk 1"),
            ({"custom_weight_loader": None}, "--custom-weight-loader updraft_sglang.weights.load"),
            ({"dp_size": 2}, "--dp-size 1"),
            ({"pp_size": 2}, "--pp-size 1"),
            ({"nnodes": 2}, "--nnodes 1"),
            ({"speculative_draft_model_path": "/nowhere"}, "prepare-sglang"),
            ({"model_path": "/nowhere"}, "is not visible here"),
            ({"tp_size": None}, "missing required fields"),
        ],
    )
    async def test_a_server_that_cannot_be_swapped_is_told_with_what_to_change_and_its_successor_is_swapped(
        self, fake: FakeSglang, beside: Beside, drafts: list[DraftCheckpoint], info: dict[str, Any], sentence: str
    ) -> None:
        fake.info = info
        async with beside.unheard() as server:
            server.hear(greeting())
            await said(server, drafts[0], sentence)

            fake.info = {}
            await beside.meet(server, id="worker-2")
            await server.swap(drafts[0])

    async def test_a_server_of_another_model_is_not_swapped(
        self, fake: FakeSglang, beside: Beside, drafts: list[DraftCheckpoint], tmp_path: Path
    ) -> None:
        fake.info = {"model_path": str(make_tiny_target(tmp_path / "other", seed=5))}
        async with beside.unheard() as server:
            server.hear(greeting())
            await said(server, drafts[0], "not the same model")

    async def test_a_server_whose_checksums_leave_out_the_vocabulary_is_not_swapped(
        self, fake: FakeSglang, beside: Beside, drafts: list[DraftCheckpoint]
    ) -> None:
        fake.shows_vocabulary = False
        fake.load(fake.seed)
        async with beside.unheard() as server:
            server.hear(greeting())
            await said(server, drafts[0], "do not cover the draft's vocabulary")
        assert "/pause_generation" not in fake.calls

    async def test_a_wrong_admin_key_is_told(self, beside: Beside, drafts: list[DraftCheckpoint]) -> None:
        async with beside.unheard(key="another") as server:
            server.hear(greeting())
            await said(server, drafts[0], "UPDRAFT_INFERENCE_SGLANG_ADMIN_KEY")

    async def test_nothing_is_known_of_a_draft_before_the_servers_checksums(
        self, fake: FakeSglang, beside: Beside, drafts: list[DraftCheckpoint]
    ) -> None:
        fake.refusals["/weights_checker"] = ["not yet"]
        fake.load(drafts[0].folder)
        async with beside.unheard() as server:
            server.hear(greeting(version=1, digest=drafts[0].tensors_digest))
            with pytest.raises(Unavailable, match=r"drafts of the ranks at .* are not known yet"):
                await server.swap(drafts[0])
            await until(lambda: len(beside.changes) == 2, what="the proof")

        first, second = beside.changes
        assert first == LoadedDraft(version=1, tensors_digest=UNKNOWN)
        assert second == LoadedDraft(version=1, tensors_digest=drafts[0].tensors_digest)
        assert "/pause_generation" not in fake.calls, "it was kept"
        assert server.info.engine == "sglang/0.5.23"

    async def test_the_plugin_of_one_rank_is_believed_and_the_server_asked_nothing(
        self, fake: FakeSglang, beside: Beside
    ) -> None:
        async with beside.unheard() as server:
            server.hear(greeting(ranks={"tensor": 1}, version=3, digest="sha256:3"))

            assert server.loaded == await server.rehash() == LoadedDraft(version=3, tensors_digest="sha256:3")
            assert beside.changes == [server.loaded]
        assert not fake.calls

    async def test_a_plugin_that_comes_again_with_the_same_draft_is_no_news(
        self, fake: FakeSglang, beside: Beside, drafts: list[DraftCheckpoint]
    ) -> None:
        async with beside.attached() as server:
            loaded = (await server.swap(drafts[0])).loaded
            fake.calls.clear()
            server.hear(Gone("worker"))
            server.hear(greeting(version=1, digest=loaded.tensors_digest))

            assert server.loaded == loaded
            await server.swap(drafts[1])
            assert "/server_info" not in fake.calls

    async def test_a_server_that_restarted_holds_its_first_draft_again(
        self, fake: FakeSglang, beside: Beside, drafts: list[DraftCheckpoint]
    ) -> None:
        async with beside.attached() as server:
            await server.swap(drafts[0])
            fake.load(fake.seed)
            await beside.meet(server, id="worker-2")

            assert server.loaded == LoadedDraft()
            assert (await server.swap(drafts[0])).loaded.version == 1

    async def test_a_pause_that_an_agent_died_in_is_ended_before_the_plugin_comes(
        self, fake: FakeSglang, beside: Beside
    ) -> None:
        beside.note.touch()
        fake.is_paused = fake.has_session = True

        async with beside.unheard():
            await until(lambda: not fake.is_paused, what="the end of the pause")
            await until(lambda: not beside.note.exists(), what="the end of the note")
        assert not fake.has_session

    async def test_a_pause_of_somebody_elses_leaves_an_unknown_draft_in_place_unproved_until_a_swap(
        self, fake: FakeSglang, beside: Beside, drafts: list[DraftCheckpoint]
    ) -> None:
        fake.load(drafts[0].folder)
        fake.is_paused = True

        async with beside.attached() as server:
            assert fake.is_paused
            assert server.loaded == LoadedDraft(tensors_digest="sha256:unproved")
            fake.is_paused = False

            assert (await server.swap(None)).loaded == LoadedDraft()
            assert await server.rehash() == LoadedDraft()

    async def test_weights_that_nobody_can_prove_are_replaced_by_the_first_draft(
        self, fake: FakeSglang, beside: Beside
    ) -> None:
        seed_hashes = dict(fake.held)
        fake.held["draft.lm_head.weight"] = "0" * 16

        async with beside.attached() as server:
            assert server.loaded == LoadedDraft()
            assert fake.held == seed_hashes


async def said(server: AttachedSglang, draft: DraftCheckpoint, sentence: str) -> None:
    """Wait until swaps are refused with this sentence."""

    async def is_said() -> bool:
        with pytest.raises(Unavailable) as refusal:
            await server.swap(draft)
        return re.search(sentence, str(refusal.value)) is not None

    await until(is_said, what=sentence)


async def test_a_data_folder_that_cannot_be_made_is_told(
    fake: FakeSglang, beside: Beside, drafts: list[DraftCheckpoint]
) -> None:
    (beside.data / "file").touch()
    beside.data = beside.data / "file" / "data"
    async with beside.unheard() as server:
        server.hear(greeting())
        await said(server, drafts[0], "UPDRAFT_INFERENCE_DATA_DIR")
