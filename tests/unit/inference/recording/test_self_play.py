"""Self-play: the target writes a user's message, answers it, and no request is made twice."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support.disk import age, file_size_limit, no_cleanup
from tests.support.fake_engine import EOS, FakeEngine, saying
from tests.support.tiny_tokenizer import START, TEMPLATE, write_tokenizer

from updraft.trace.v1 import trace_pb2
from updraft_chassis.errors import Conflict, Exhausted, InvalidInput
from updraft_chassis.progress import Progress
from updraft_draft import recordings
from updraft_inference.engine import GenerationRequest
from updraft_inference.recording.recorder import STREAMS, Recorder
from updraft_inference.recording.self_play import MAX_ATTEMPTS, Conversation, SelfPlay

TARGET = "sha256:target"
HEADER = "<|start|>user\n"


class Player:
    """An engine whose messages and answers are known, and the requests that it got."""

    def __init__(self, folder: Path, script: Callable[[GenerationRequest], Iterator[int]] | None = None) -> None:
        self.requests: list[GenerationRequest] = []
        self.reports: list[Progress] = []
        self.folder = folder / "recordings"
        self._script = script or saying("Why?")
        self._conversation = Conversation(write_tokenizer(folder / "model"))
        self._engine = FakeEngine(script=self._continue, num_slots=STREAMS)

    async def play(self, count: int) -> None:
        jobs = SelfPlay(self._conversation, frozenset({EOS})).jobs(count)
        await Recorder(self._engine, self.folder, self.reports.append).run(jobs, count)

    def made(self) -> list[str]:
        """Ids of the requests that were answered, in order; those of the messages are left out."""
        return sorted(one.request_id for one in self.requests if one.capture.payload)

    def _continue(self, request: GenerationRequest) -> Iterator[int]:
        self.requests.append(request)
        return self._script(request)


def name(number: int) -> str:
    return f"self-play-{number:05}"


def trace(folder: Path, number: int) -> trace_pb2.Trace:
    data = recordings.read(folder, name(number), target_fingerprint=TARGET)
    assert data is not None
    return trace_pb2.Trace.FromString(data)


def text(ids: object) -> bytes:
    """Of tokens of the tiny tokenizer; special ones as `<` and `>`."""
    return bytes({START: ord("<"), EOS: ord(">")}.get(token, token) for token in ids)  # type: ignore[attr-defined]


async def test_the_target_writes_a_message_after_its_own_header_and_answers_it(tmp_path: Path) -> None:
    player = Player(tmp_path)
    await player.play(1)
    message, answer = player.requests
    assert text(message.prompt_ids) == b"<user\n"
    assert text(answer.prompt_ids) == b"<user\nWhy?>\n<assistant\n"
    assert (message.sampling.temperature, message.sampling.top_k, message.sampling.top_p) == (1.0, 512, 0.95)
    assert answer.sampling.temperature == 0.0


async def test_an_answer_is_recorded_with_its_hidden_states(tmp_path: Path) -> None:
    player = Player(tmp_path)
    await player.play(2)
    first, second = (trace(player.folder, number) for number in (0, 1))
    assert text(first.output_ids).startswith(b"Why?")
    assert first.payload.aux_hidden.rows > len(first.output_ids)
    assert first.header.trace_id != second.header.trace_id


async def test_messages_of_different_requests_have_different_seeds(tmp_path: Path) -> None:
    player = Player(tmp_path)
    await player.play(20)
    seeds = [one.sampling.seed for one in player.requests if not one.capture.payload]
    assert len(set(seeds)) == 20


async def test_a_resumed_run_makes_no_request_twice(tmp_path: Path) -> None:
    player = Player(tmp_path)
    await player.play(3)
    await player.play(8)
    assert player.made() == [f"self-play/{number}" for number in range(8)]
    before = len(player.requests)
    await player.play(8)
    assert len(player.requests) == before


async def test_a_broken_recording_is_made_again(tmp_path: Path) -> None:
    player = Player(tmp_path)
    await player.play(3)
    whole = trace(player.folder, 1)
    place = recordings.path(player.folder, name(1))
    place.write_bytes(place.read_bytes()[:-5])
    await player.play(3)
    assert player.made().count("self-play/1") == 2
    assert len(player.made()) == 4
    assert trace(player.folder, 1).output_ids == whole.output_ids


async def test_a_run_removes_what_a_killed_one_was_writing(tmp_path: Path) -> None:
    player = Player(tmp_path)
    await player.play(1)
    with no_cleanup(), file_size_limit(100), pytest.raises(Exhausted):
        await player.play(2)
    (part,) = player.folder.glob("*.part")
    age(part, hours=2)
    await player.play(2)
    assert sorted(path.name for path in player.folder.iterdir()) == ["self-play-00000.trace", "self-play-00001.trace"]


async def test_progress_counts_what_was_recorded_before(tmp_path: Path) -> None:
    player = Player(tmp_path)
    await player.play(3)
    player.reports.clear()
    await player.play(5)
    assert [one.done for one in player.reports] == [3, 4, 5, 5]
    assert player.reports[0].tokens == 0
    assert [one.note for one in player.reports if one.note] == ["3 requests were recorded already."]
    assert player.reports[-1].tokens == sum(len("Why?>") for _ in range(4))


async def test_recordings_behind_the_first_missing_one_count_as_found(tmp_path: Path) -> None:
    player = Player(tmp_path)
    await player.play(3)
    recordings.path(player.folder, name(0)).unlink()
    player.reports.clear()
    await player.play(3)
    assert [one.note for one in player.reports if one.note] == ["2 requests were recorded already."]


async def test_a_folder_of_another_model_is_refused_before_any_request(tmp_path: Path) -> None:
    player = Player(tmp_path)
    other = trace_pb2.Trace(header=trace_pb2.Header(target_fingerprint="sha256:other"))
    recordings.write(player.folder, name(0), other)
    with pytest.raises(Conflict, match="recordings of another model"):
        await player.play(2)
    assert player.requests == []


async def test_a_message_of_no_text_is_written_again_and_at_last_the_model_is_refused(tmp_path: Path) -> None:
    player = Player(tmp_path, saying(" \n"))
    with pytest.raises(InvalidInput, match="self-play needs a chat model"):
        await player.play(1)
    assert len({one.sampling.seed for one in player.requests}) == MAX_ATTEMPTS


async def test_an_error_of_many_requests_at_a_time_is_raised_once(tmp_path: Path) -> None:
    player = Player(tmp_path, saying(" \n"))
    with pytest.raises(InvalidInput, match="self-play needs a chat model"):
        await player.play(STREAMS)


async def test_a_bug_keeps_its_traceback(tmp_path: Path) -> None:
    def broken(_: GenerationRequest) -> Iterator[int]:
        raise ZeroDivisionError

    with pytest.RaisesGroup(ZeroDivisionError):
        await Player(tmp_path, broken).play(1)


def test_a_message_ends_where_the_template_or_the_model_would_end_it(tmp_path: Path) -> None:
    conversation = Conversation(write_tokenizer(tmp_path))
    hello = tuple(b"hello")
    assert conversation.message((*hello, EOS, *hello), frozenset()) == hello, "the template's end"
    assert conversation.message((*hello, START, *hello), frozenset({START})) == hello, "the model's end"
    assert conversation.message(hello, frozenset()) == hello, "cut off by its limit"


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="has no chat template, so nothing shows how its prompts begin"):
        Conversation(write_tokenizer(tmp_path, template=None))


@pytest.mark.parametrize(
    "template", [TEMPLATE.replace("message['content']", "message['content'] | upper"), "{{ messages[0]['content'] }}"]
)
def test_a_template_that_hides_the_message_or_its_end_is_refused(tmp_path: Path, template: str) -> None:
    with pytest.raises(InvalidInput, match="does not show where a user's message ends"):
        Conversation(write_tokenizer(tmp_path, template=template))
