"""Prompts of a file: which records are understood, and what happens to lines that hold none."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.fake_engine import EOS, FakeEngine, saying
from tests.support.tiny_tokenizer import START, write_tokenizer

from updraft.trace.v1 import trace_pb2
from updraft_chassis.errors import InvalidInput
from updraft_chassis.progress import Progress
from updraft_draft import recordings
from updraft_inference.engine import GenerationRequest
from updraft_inference.recording import prompts as module
from updraft_inference.recording.options import AnswerOptions
from updraft_inference.recording.prompts import Prompts, conversation, count_lines
from updraft_inference.recording.recorder import STREAMS, Recorder

OPTIONS = AnswerOptions(max_tokens=8, temperature=0.0, seed=0, max_context=64)
USER = {"role": "user", "content": "Why?"}


class Folder:
    """A tiny model, a file of prompts, and the requests that were recorded of it."""

    def __init__(self, path: Path) -> None:
        self.file = path / "prompts.jsonl"
        self.recordings = path / "recordings"
        self.asked: list[GenerationRequest] = []
        self.reports: list[Progress] = []
        self.model = write_tokenizer(path / "model")

    def write(self, *records: object) -> None:
        """Write a line for each record; bytes as they are."""
        lines = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in records]
        self.file.write_bytes(b"".join(line + b"\n" for line in lines))

    async def record(self, options: AnswerOptions = OPTIONS) -> str:
        """Record all, and return the summary."""
        prompts = Prompts(self.file, self.model, options)

        def script(request: GenerationRequest):  # type: ignore[no-untyped-def]
            self.asked.append(request)
            return saying("Yes.")(request)

        engine = FakeEngine(script=script, num_slots=STREAMS)
        recorder = Recorder(engine, self.recordings, self.reports.append)
        await recorder.run(prompts.jobs(), count_lines(self.file))
        return prompts.summary()

    def texts(self) -> set[bytes]:
        """Recorded prompts as bytes, with special tokens as `<` and `>`."""
        read = (recordings.read(self.recordings, one, target_fingerprint="sha256:target") for one in self.names())
        traces = [trace_pb2.Trace.FromString(data) for data in read if data is not None]
        special = {START: ord("<"), EOS: ord(">")}
        return {bytes(special.get(token, token) for token in trace.prompt_ids) for trace in traces}

    def names(self) -> list[str]:
        return sorted(recordings.names(self.recordings))


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Why?"},
        {"prompt": [USER]},
        {"messages": [USER]},
        {"messages": [USER, {"role": "assistant", "content": "Because."}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Why"}, {"type": "text", "text": "?"}]}]},
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]},
    ],
)
async def test_records_that_people_have_become_the_same_prompt_without_their_last_answer(
    folder: Folder, record: object
) -> None:
    folder.write(record)
    assert await folder.record() == ""
    assert folder.texts() == {b"<user\nWhy?>\n<assistant\n"}


def test_earlier_turns_and_the_system_message_are_kept() -> None:
    earlier = [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "Because."}, USER]
    assert conversation({"messages": [{**earlier[0], "role": "developer"}, *earlier[1:], earlier[2]]}) == earlier


async def test_a_model_without_a_chat_template_continues_the_text(folder: Folder) -> None:
    write_tokenizer(folder.model, template=None)
    folder.write({"prompt": "Once upon"}, {"messages": [USER]})
    summary = await folder.record()
    assert folder.texts() == {b"Once upon"}
    assert "1 with messages, for which the model has no chat template (first: line 2)" in summary


BAD = [
    (b"{broken", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b"\xff\xfe\x00", "not UTF-8 text"),
    (b'{"prompt": "\\ud800"}', "not Unicode text"),
    ([USER], "no JSON object"),
    ({"text": "Why?"}, 'without "prompt", "messages" or "conversations"'),
    ({"prompt": 7}, 'without "prompt", "messages" or "conversations"'),
    ({"prompt": " \n"}, "without text"),
    ({"messages": []}, "without a user's message"),
    ({"messages": [{"role": "assistant", "content": "Hello."}]}, "without a user's message"),
    ({"messages": ["Why?"]}, "with a message that is no text of system, user or assistant"),
    ({"messages": [{"role": [], "content": "?"}]}, "with a message that is no text of system, user or assistant"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "with a message that is no text of"),
    ({"messages": [USER, {"role": "tool", "content": "7"}]}, "with a message that is no text of"),
    ({"prompt": "long" * 100}, "of more than 56 tokens"),
    ({"prompt": "Fine."}, "repeated"),
]


@pytest.mark.parametrize(("line", "reason"), BAD)
async def test_a_bad_line_among_good_ones_is_left_out_and_named(folder: Folder, line: object, reason: str) -> None:
    folder.write({"prompt": "Fine."}, line, {"prompt": "Also fine."})
    summary = await folder.record()
    assert summary.startswith(f"{folder.file}: 2 prompts; left out: 1 {reason}")
    assert summary.endswith("(first: line 2).")
    assert len(folder.names()) == 2
    assert (folder.reports[-1].done, folder.reports[-1].total) == (3, 3)


async def test_a_file_without_any_prompt_is_an_error_that_names_file_and_line(folder: Folder) -> None:
    folder.write(*[b"\x00\x01\xff"] * 3)
    with pytest.raises(InvalidInput) as refused:
        await folder.record()
    assert str(refused.value) == f"{folder.file} holds no prompt to answer: 3 not UTF-8 text (first: line 1)"


@pytest.mark.parametrize("content", [b"", b"\n\n"])
async def test_an_empty_file_is_an_error(folder: Folder, content: bytes) -> None:
    folder.file.write_bytes(content)
    with pytest.raises(InvalidInput, match="holds no prompt to answer: it is empty"):
        await folder.record()


async def test_a_line_that_would_not_fit_into_memory_is_skipped_without_being_read_whole(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_LINE_BYTES", 64)
    folder.write({"prompt": "Fine."}, {"prompt": "long" * 100}, {"prompt": "Also fine."})
    summary = await folder.record()
    assert "1 longer than" in summary
    assert folder.texts() == {b"<user\nFine.>\n<assistant\n", b"<user\nAlso fine.>\n<assistant\n"}


async def test_a_byte_order_mark_blank_lines_and_a_last_line_without_an_end_are_fine(folder: Folder) -> None:
    folder.file.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b"}')
    assert await folder.record() == ""
    assert len(folder.names()) == 2
    assert folder.reports[-1].done == count_lines(folder.file) == 3


async def test_recorded_prompts_are_not_answered_again_wherever_they_stand_in_the_file(folder: Folder) -> None:
    folder.write({"prompt": "a"}, {"prompt": "b"})
    await folder.record()
    folder.write({"prompt": "c"}, {"prompt": "b"}, {"prompt": "a"})
    await folder.record()
    assert len(folder.asked) == 3
    assert len(folder.names()) == 3


@pytest.mark.parametrize("other", [{"max_tokens": 9}, {"temperature": 0.5}, {"seed": 1}])
async def test_an_answer_under_other_options_is_another_recording(folder: Folder, other: dict[str, float]) -> None:
    folder.write({"prompt": "a"})
    await folder.record()
    values = {"max_tokens": 8, "temperature": 0.0, "seed": 0, "max_context": 64} | other
    await folder.record(AnswerOptions(**values))  # type: ignore[arg-type]
    assert len(folder.names()) == 2
    assert folder.asked[0].sampling.seed != folder.asked[1].sampling.seed


def test_answers_that_leave_no_room_for_a_prompt_are_refused() -> None:
    with pytest.raises(InvalidInput, match="answers of 64 tokens leave no room for a prompt in a context of 64"):
        AnswerOptions(max_tokens=64, temperature=0.0, seed=0, max_context=64)


def test_a_file_that_is_gone_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"cannot read .*none: No such file"):
        count_lines(tmp_path / "none")


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 10**30])
async def test_a_seed_may_have_any_size(folder: Folder, seed: int) -> None:
    folder.write({"prompt": "Why?"})
    await folder.record(OPTIONS)
    await folder.record(replace(OPTIONS, seed=seed))
    assert len(folder.names()) == 2
