"""A grammar tells each verify row what it may be, and forgets what was only drafted."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.tiny_tokenizer import END, write_tokenizer

from updraft_chassis.errors import InvalidInput
from updraft_inference.torch_engine.sampling.grammar import Grammar, Grammars

VOCAB = 300
"""More than the tokenizer has, as models do."""

names = st.sampled_from(["a", "b", "é"])
schemas = st.recursive(
    st.sampled_from([{"type": "boolean"}, {"type": "integer"}, {"type": "string"}, {"enum": ["x", 1, None]}, {}]),
    lambda inner: (
        st.builds(lambda items: {"type": "array", "items": items, "maxItems": 2}, inner)
        | st.builds(
            lambda properties: {"type": "object", "properties": properties, "required": list(properties)},
            st.dictionaries(names, inner, max_size=2),
        )
        | st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=2))
    ),
    max_leaves=4,
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "properties", "items", "pattern", "$ref", "enum", "const", "minimum", "anyOf", "x-guidance"]
            )
            | st.text(max_size=4),
            inner | st.sampled_from(["object", "array", "string", "#", "(", "[a-z]{1,99}"]),
            max_size=3,
        )
    ),
    max_leaves=10,
)


@pytest.fixture(scope="module")
def grammars(tmp_path_factory: pytest.TempPathFactory) -> Grammars:
    return Grammars(write_tokenizer(tmp_path_factory.mktemp("model")), VOCAB, frozenset({END}))


@settings(max_examples=80, deadline=None)
@given(schema=schemas, data=st.data())
def test_each_row_is_that_of_a_grammar_which_has_read_the_drafts_before_it(
    grammars: Grammars, schema: dict[str, object], data: st.DataObject
) -> None:
    """A walk of several steps, each with drafts of which some are allowed and some are not, and some are kept."""
    text = json.dumps(schema)
    grammar = grammars.of_json_schema(text)
    output: list[int] = []
    for _ in range(4):
        drafts: list[int] = []
        for _ in range(3):
            row = grammars.of_json_schema(text).allowed([*output, *drafts], [])[0]
            assert row.any()
            assert not row[END + 1 :].any(), "what is no token of the tokenizer is never allowed"
            right = st.sampled_from(row.nonzero()[:, 0].tolist())
            drafts.append(data.draw(right | st.integers(0, VOCAB - 1) if drafts else right))
            if not row[drafts[-1]] or drafts[-1] == END:
                break
        rows = grammar.allowed(output, drafts)
        assert rows.shape == (len(drafts) + 1, VOCAB)
        num_reached = 0
        for i, row in enumerate(rows):
            assert torch.equal(row, grammars.of_json_schema(text).allowed([*output, *drafts[:i]], [])[0])
            num_reached = i
            if i == len(drafts) or not row[drafts[i]] or drafts[i] == END:
                break
        kept = drafts[: data.draw(st.integers(0, num_reached))]
        output += kept
        if END in output:
            break
    assert grammar.failure is None


def grammar_or_refusal(grammars: Grammars, schema: str) -> Grammar | str:
    try:
        return grammars.of_json_schema(schema)
    except InvalidInput as error:
        return str(error)


@pytest.mark.attack(
    boundary="client",
    attack="any text as a JSON schema or pattern",
    outcome="it is a grammar, or refused in one line",
)
@settings(max_examples=150, deadline=None)
@given(schema=anything.map(json.dumps) | st.text(max_size=20))
def test_anything_is_a_grammar_or_a_refusal_in_one_line(grammars: Grammars, schema: str) -> None:
    made = grammar_or_refusal(grammars, schema)
    if isinstance(made, str):
        assert made.startswith("response_format: ")
        assert "\n" not in made
    else:
        assert made.allowed([], [ord("{"), ord('"')]).any(-1).all()


def test_a_pattern_that_cannot_be_read_is_refused_with_the_reason(grammars: Grammars) -> None:
    with pytest.raises(InvalidInput, match=r"^response_format: .*regex parse error: error: unclosed group$"):
        grammars.of_json_schema('{"type": "string", "pattern": "((a"}')


def test_blanks_come_to_an_end(grammars: Grammars) -> None:
    grammar = grammars.of_json_schema('{"type": "object"}')
    assert not grammar.allowed([ord("{"), *([ord(" ")] * 24)], [])[0, ord(" ")]


def test_a_grammar_that_fails_says_so_and_raises_nothing(grammars: Grammars) -> None:
    grammar = grammars.of_json_schema('{"type": "object"}')
    rows = grammar.allowed([ord("x")], [ord("y")])
    assert grammar.failure is not None
    assert rows.all()


def test_a_tokenizer_that_is_none_is_refused_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidInput, match=r"cannot read the tokenizer .*tokenizer\.json"):
        Grammars(tmp_path, VOCAB, frozenset({END})).of_json_schema("{}")
