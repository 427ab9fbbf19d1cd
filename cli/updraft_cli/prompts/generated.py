"""Prompts from small generators: every combination of the parts in generated.yaml, in a fixed shuffled order."""

import random
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import yaml

_MAX_PROMPTS = 2000

_PARTS: Mapping[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())

_TABLE = "CREATE TABLE {name} (id INTEGER PRIMARY KEY, {label} TEXT, {group} TEXT, {measure} REAL, {day} DATE);"


def sql() -> list[str]:
    """Return requests to write one SQL statement for a table whose definition is given."""
    return _shuffled(
        f"Given the table\n\n{_TABLE.format(**table)}\n\nWrite a SQL query that"
        f" {query.format(**table, value=value, number=number, year=2000 + number)}."
        for table, query in product(_PARTS["tables"], _PARTS["queries"])
        for value, number in product(table["values"], (3, 5, 10, 12, 15, 20, 25))
    )


def json() -> list[str]:
    """Return requests to write the facts of a sentence as a JSON object."""
    return _shuffled(
        f"Write the facts of this sentence as a JSON object with the keys {record['keys']}.\n\n"
        + record["sentence"].format(person=person, city=city, job=job, **_numbers(number))
        for record in _PARTS["records"]
        for person, city, job in product(_PARTS["people"], _PARTS["cities"], _PARTS["jobs"])
        for number in (3, 8, 17, 24, 31)
    )


def chat() -> list[str]:
    return _shuffled(question.format(topic=topic) for question, topic in product(_PARTS["questions"], _PARTS["topics"]))


def _numbers(number: int) -> dict[str, int]:
    """Plausible numbers for a sentence, all from one."""
    return {
        "age": 20 + number,
        "nights": 1 + number % 9,
        "price": 60 + number,
        "weight": 1 + number % 12,
        "items": 2 + number % 4,
        "day": 1 + number % 28,
        "seats": 10 + number,
    }


def _shuffled(prompts: Iterable[str]) -> list[str]:
    """Shuffle the combinations, so that any part of the catalogue has all kinds."""
    shuffled = list(prompts)
    random.Random(0).shuffle(shuffled)
    return shuffled[:_MAX_PROMPTS]
