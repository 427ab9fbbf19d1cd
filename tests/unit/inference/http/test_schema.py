import json

import pytest
from pydantic import ValidationError

from updraft_inference.http.errors import ApiError
from updraft_inference.http.schema import ChatBody, CompletionBody, parse


def completion(**fields: object) -> CompletionBody:
    return parse(CompletionBody, json.dumps({"model": "m", "prompt": "p", **fields}).encode())


def chat(**fields: object) -> ChatBody:
    messages = [{"role": "user", "content": "hi"}]
    return parse(ChatBody, json.dumps({"model": "m", "messages": messages, **fields}).encode())


def test_defaults_are_openais() -> None:
    body = completion()

    assert (body.temperature, body.top_p, body.top_k, body.seed) == (1.0, 1.0, 0, None)
    assert (body.max_tokens, body.stop, body.stream) == (None, [], False)


def test_null_means_the_default() -> None:
    nulls = dict.fromkeys(
        ("temperature", "top_p", "top_k", "seed", "stop", "max_tokens", "stream", "ignore_eos", "updraft", "n")
    )

    assert completion(**nulls) == completion()


@pytest.mark.parametrize(
    ("given", "read"),
    [
        pytest.param("text", "text", id="text"),
        pytest.param(["text"], "text", id="a list of one text"),
        pytest.param([1, 2], [1, 2], id="token ids"),
        pytest.param([[1, 2]], [1, 2], id="a list of one list of token ids"),
        pytest.param([], [], id="no tokens"),
    ],
)
def test_a_prompt_is_text_or_token_ids(given: object, read: object) -> None:
    assert completion(prompt=given).prompt == read


def test_what_changes_the_answer_is_read() -> None:
    body = completion(
        min_p=0.1,
        repetition_penalty=1.2,
        presence_penalty=-1,
        frequency_penalty=2,
        logit_bias={"7": -100, "0": 0.5},
        n=3,
        max_completion_tokens=9,
    )

    assert (body.min_p, body.repetition_penalty, body.presence_penalty, body.frequency_penalty) == (0.1, 1.2, -1, 2)
    assert dict(body.logit_bias) == {7: -100, 0: 0.5}
    assert (body.n, body.most_tokens) == (3, 9)


@pytest.mark.parametrize(
    ("response_format", "schema"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        (
            {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": {"enum": ["é"]}}},
            {"enum": ["é"]},
        ),
    ],
)
def test_a_response_format_is_a_json_schema(response_format: object, schema: object) -> None:
    read = chat(response_format=response_format).response_format

    assert (None if read is None else json.loads(read)) == schema


def test_a_chat_says_whether_and_a_completion_how_many_log_probabilities_it_wants() -> None:
    assert chat(logprobs=True, top_logprobs=4).num_top_logprobs == 4
    assert chat(logprobs=True).num_top_logprobs == 0
    assert chat().num_top_logprobs is None
    assert completion(logprobs=3).num_top_logprobs == 3
    assert completion(logprobs=0).num_top_logprobs == 0
    assert completion().num_top_logprobs is None


def test_content_may_come_in_parts_of_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]

    assert chat(messages=[{"role": "developer", "content": parts}]).messages[0].turn == {
        "role": "system",
        "content": "ab",
    }


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"n": 1, "logprobs": None, "echo": False, "presence_penalty": 0, "logit_bias": {}}, id="off"),
        pytest.param({"logprobs": False, "top_logprobs": 0}, id="off as in a chat"),
        pytest.param({"user": "u", "metadata": {"a": 1}, "store": True, "made_up": [1]}, id="harmless"),
        pytest.param({"response_format": {"type": "text"}, "tool_choice": "none"}, id="what we do anyway"),
        pytest.param({"top_k": -1}, id="vLLM's way to say off"),
    ],
)
def test_fields_that_change_nothing_are_ignored(fields: dict[str, object]) -> None:
    assert completion(**fields) == completion()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("echo", True),
        ("tools", [{"type": "function"}]),
        ("suffix", "x"),
        ("best_of", 3),
        ("best_of", True),
        ("top_logprobs", 2),
        ("min_tokens", 5),
    ],
)
def test_fields_that_would_change_the_answer_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ApiError) as caught:
        completion(**{field: value})

    assert (caught.value.status, caught.value.param, caught.value.code) == (400, field, "unsupported_parameter")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [[1], [2]]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 10**4299}, "max_tokens"),  # and one more could not be printed
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 2**40}, "top_k"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 257}, "stop.0"),
        ({"stop": [""]}, "stop.0"),
        ({"stop": 5}, "stop"),
        ({"stream": 1}, "stream"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"n": True}, "n"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": -2.5}, "presence_penalty"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"logit_bias": []}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"01": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias.0.1"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, None),
        ({"max_completion_tokens": 5, "max_tokens": 6}, None),
        ({"stream_options": {"include_usage": True}}, None),
        ({"updraft": {"drafter": "magic"}}, "updraft.drafter"),
        ({"updraft": {"lookahead": 65}}, "updraft.lookahead"),
        ({"updraft": {"draftr": "none"}}, "updraft.draftr"),
        ({"updraft": {"domain": "x" * 65}}, "updraft.domain"),
    ],
)
def test_absurd_values_are_refused_with_the_field(fields: dict[str, object], param: str | None) -> None:
    with pytest.raises(ApiError) as caught:
        completion(**fields)

    assert (caught.value.status, caught.value.param) == (400, param)
    assert param is None or param in caught.value.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [7]}]}, "messages.0.content"),
        ({"messages": [None]}, "messages.0"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 5, "max_tokens": 6}, None),
        ({"top_logprobs": 2}, None),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"logprobs": 2}, "logprobs"),
    ],
)
def test_conversations_that_make_no_sense_are_refused_with_the_field(
    fields: dict[str, object], param: str | None
) -> None:
    with pytest.raises(ApiError) as caught:
        chat(**fields)

    assert (caught.value.status, caught.value.param) == (400, param)


def test_only_the_first_wrong_message_is_told_of() -> None:
    """All of them, in a body of a mebibyte, would take seconds in which nothing else is served."""
    with pytest.raises(ValidationError) as caught:
        ChatBody.model_validate({"model": "m", "messages": [{"role": "user"}] * 1000})

    assert caught.value.error_count() == 1


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b'{"model": ', id="half"),
        pytest.param(b"[]", id="no object"),
        pytest.param(b'{"model": "m", "prompt": "p", "temperature": NaN}', id="NaN"),
        pytest.param(b'{"model": "m", "prompt": "p", "temperature": 1e999}', id="infinite"),
        pytest.param(b'{"model": "m", "prompt": "\xff"}', id="no UTF-8"),
        pytest.param(b'{"model": "m", "prompt": "\\ud800"}', id="half a surrogate pair"),
        pytest.param(b"[" * 100_000, id="deep"),
        pytest.param(b'{"model": "m", "prompt": "p", "seed": ' + b"9" * 10_000 + b"}", id="a huge number"),
    ],
)
def test_a_body_that_is_no_request_is_refused(raw: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse(CompletionBody, raw)

    assert caught.value.status == 400
