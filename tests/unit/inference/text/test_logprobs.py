from hypothesis import given
from hypothesis import strategies as st
from tests.support.tiny_tokenizer import byte_level

from updraft_inference.engine import TokenLogprob
from updraft_inference.text.logprobs import Transcript
from updraft_inference.text.tokenization import Tokenizer

BYTES_OF = Tokenizer(byte_level()).bytes_of


def scored(text: bytes) -> list[TokenLogprob]:
    return [TokenLogprob(token_id=byte, log_prob=-0.5) for byte in text]


def test_a_chat_tells_text_bytes_and_what_else_was_likely() -> None:
    token = TokenLogprob(token_id=0xC3, log_prob=-0.5, top=((0xC3, -0.5), (ord("a"), float("-inf"))))

    assert Transcript(BYTES_OF).chat([token]) == {
        "content": [
            {
                "token": "\ufffd",
                "logprob": -0.5,
                "bytes": [0xC3],
                "top_logprobs": [
                    {"token": "\ufffd", "logprob": -0.5, "bytes": [0xC3]},
                    {"token": "a", "logprob": -9999.0, "bytes": [ord("a")]},
                ],
            }
        ],
        "refusal": None,
    }


def test_a_completion_tells_the_likelier_of_two_tokens_that_look_alike() -> None:
    token = TokenLogprob(token_id=0xC3, log_prob=-0.5, top=((0xC3, -0.5), (0xC4, -1.0), (ord("a"), -2.0)))

    assert Transcript(BYTES_OF).completion([token]) == {
        "text_offset": [0],
        "tokens": ["\ufffd"],
        "token_logprobs": [-0.5],
        "top_logprobs": [{"\ufffd": -0.5, "a": -2.0}],
    }


@given(text=st.text(max_size=20), cut=st.integers(0, 40))
def test_offsets_are_where_each_tokens_character_begins_however_tokens_are_grouped(text: str, cut: int) -> None:
    tokens = scored(text.encode())
    transcript = Transcript(BYTES_OF)

    offsets = [
        offset
        for group in (tokens[:cut], tokens[cut:])
        for offset in transcript.completion(group)["text_offset"]  # type: ignore[attr-defined]  # JSON
    ]

    assert offsets == [i for i, char in enumerate(text) for _ in char.encode()]


@given(text=st.text(max_size=20))
def test_a_chats_bytes_are_the_text(text: str) -> None:
    content = Transcript(BYTES_OF).chat(scored(text.encode()))["content"]

    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == text  # type: ignore[attr-defined]
