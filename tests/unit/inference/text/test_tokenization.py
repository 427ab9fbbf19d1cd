import re
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.tiny_tokenizer import END, byte_level
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models

from updraft_chassis.errors import InvalidInput
from updraft_inference.text.tokenization import Detokenizer, StopStrings, TextStream, Tokenizer


def sentencepiece_like() -> Tokenizer:
    """Pieces with a marked space, and byte tokens for what has no piece, as Llama 2 has them."""
    pieces = ["<unk>", "▁Hello", "▁", "world", "é", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = HfTokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    return Tokenizer(tokenizer)


BYTES = Tokenizer(byte_level())
FIRST_BYTE = 5


def grouped(items: list[int], cuts: list[int]) -> list[list[int]]:
    """`items` in groups that end at `cuts`."""
    bounds = sorted({0, len(items), *(cut % (len(items) + 1) for cut in cuts)})
    return [items[a:b] for a, b in pairwise(bounds)]


def test_a_long_prompt_is_read_beside_other_threads() -> None:
    num_turns = 0
    with ThreadPoolExecutor(1) as other:
        reading = other.submit(BYTES.encode, "a" * 1_000_000, add_special_tokens=True)
        while not reading.done():
            wait([reading], timeout=0.001)
            num_turns += 1
    assert num_turns > 3, "this thread stood still"


@given(text=st.text(), cuts=st.lists(st.integers(0, 1000)))
def test_text_comes_back_whole_however_its_tokens_are_grouped(text: str, cuts: list[int]) -> None:
    detokeniser = Detokenizer(BYTES)

    shown = [detokeniser.push(group) for group in grouped(list(text.encode()), cuts)]

    assert "".join(shown) + detokeniser.flush() == text.rstrip("\ufffd")
    assert "\ufffd" in text or not any("\ufffd" in part for part in shown)


@given(text=st.text(min_size=1))
def test_a_character_is_shown_with_its_last_byte_and_not_before(text: str) -> None:
    detokeniser = Detokenizer(BYTES, list(b"prompt"))
    shown = ""

    for i, byte in enumerate(encoded := text.encode()):
        shown += detokeniser.push([byte])
        if "\ufffd" not in text:
            assert shown == encoded[: i + 1].decode(errors="ignore")


def test_a_character_that_the_end_cuts_off_is_left_out() -> None:
    detokeniser = Detokenizer(BYTES)

    assert detokeniser.push("né".encode()[:2]) + detokeniser.flush() == "n"


@given(garbage=st.lists(st.integers(0x80, 0xFF), max_size=60))
def test_bytes_that_are_no_text_neither_stop_the_stream_nor_hide_what_follows(garbage: list[int]) -> None:
    detokeniser = Detokenizer(BYTES)

    shown = detokeniser.push([*garbage, *b"the end"]) + detokeniser.flush()

    assert shown.endswith("the end")


@given(st.lists(st.sampled_from(["emoji", "hello", "world", "space", "é"]), max_size=12))
def test_byte_tokens_and_marked_spaces_read_as_when_decoded_at_once(words: list[str]) -> None:
    tokenizer = sentencepiece_like()
    emoji = [FIRST_BYTE + byte for byte in "🙂".encode()]
    ids = {"emoji": emoji, "hello": [1], "world": [3], "space": [2], "é": [FIRST_BYTE + b for b in "é".encode()]}
    token_ids = [1, *(token for word in words for token in ids[word])]
    detokeniser = Detokenizer(tokenizer)

    assert detokeniser.push(token_ids) + detokeniser.flush() == tokenizer.decode(token_ids)


def test_the_space_between_prompt_and_answer_is_kept() -> None:
    detokeniser = Detokenizer(sentencepiece_like(), [1])

    assert detokeniser.push([1, 3]) == " Helloworld"


def test_special_tokens_are_not_shown() -> None:
    detokeniser = Detokenizer(BYTES)

    assert detokeniser.push([END] * 30 + [*b"a", END, *b"b"]) == "ab"


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"has no tokenizer\.json"):
        Tokenizer.open(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff\xfe", b'{"version": "1.0"}'])
def test_a_damaged_tokenizer_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(InvalidInput, match=f"^{re.escape(str(tmp_path))}/tokenizer.json is not a tokenizer: .+"):
        Tokenizer.open(tmp_path)


@given(
    text=st.text(alphabet="abc", max_size=40),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 50)),
)
def test_a_stop_string_cuts_at_the_same_place_however_text_arrives(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    at_once, singly = StopStrings(stops), StopStrings(stops)

    whole = at_once.push(text) + at_once.flush()
    parts = "".join(singly.push("".join(map(chr, group))) for group in grouped(list(map(ord, text)), cuts))

    assert parts + singly.flush() == whole
    assert text.startswith(whole)
    assert not any(stop in whole for stop in stops)
    assert at_once.is_found == any(stop in text for stop in stops)


def test_what_may_begin_a_stop_string_is_held_back_and_shown_when_it_does_not() -> None:
    stops = StopStrings(["\nUser:"])

    assert stops.push("fine\nUse") == "fine"
    assert stops.push("ful") == "\nUseful"
    assert stops.push("\nUser") == ""
    assert stops.flush() == "\nUser"


def test_the_stop_string_that_is_complete_first_wins() -> None:
    stops = StopStrings(["bcd", "c"])

    assert stops.push("abcd") == "ab"


@given(cut=st.integers(0, 40))
def test_tokens_after_a_stop_string_are_not_counted(cut: int) -> None:
    token_ids = list(b"one two three four")
    stream = TextStream(BYTES, [], ["two"])

    shown = stream.push(token_ids[:cut]) + stream.push(token_ids[cut:]) + stream.flush()

    assert shown == "one "
    assert stream.is_stopped
    assert stream.num_tokens == len("one two")
