"""Seven kinds of requests from installed packages, each with held-out requests that no arm trains on.

Five are the domains of the demo. `explain` and `logic` are kept out: no default is tuned on them, and a table shows them apart.
"""

import ast
import importlib.util
import random
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain, islice, zip_longest
from pathlib import Path

from updraft_cli import prompts

MODULES = (
    "argparse", "asyncio.base_events", "calendar", "collections", "configparser", "csv", "datetime", "difflib",
    "email.message", "fractions", "functools", "heapq", "html.parser", "http.client", "imaplib", "inspect", "json.decoder",
    "logging", "mailbox", "pathlib", "pickletools", "pprint", "random", "shutil", "statistics", "string", "subprocess",
    "tarfile", "tempfile", "textwrap", "threading", "tokenize", "typing", "unittest.case", "urllib.parse", "uuid", "zipfile",
)  # fmt: skip
"""Modules of the standard library with small functions, whose purpose shows in their code."""

PUZZLES = ("family_relationships", "knights_knaves", "syllogism", "aiw", "time_intervals")
NUM_PUZZLES = 200
"""Puzzles from each data set of reasoning-gym."""

MIN_LINES, MAX_LINES = 4, 16
HELD_OUT_EVERY = 5


def requests(kind: str, count: int, *, held_out: bool) -> list[str]:
    """`count` requests in the same order every time; InvalidInput if there are fewer."""
    if kind in prompts.DOMAINS:
        return prompts.domain_prompts(kind, count, held_out=held_out)
    texts = [text for n, text in enumerate(_catalogue(kind)) if (n % HELD_OUT_EVERY == 0) is held_out]
    if count > len(texts):
        raise ValueError(f"the kind {kind} has {len(texts)} requests; {count} were asked for")
    return texts[:count]


def explain() -> Iterator[str]:
    """Ask what a function of the standard library does."""
    for module in MODULES:
        for source in _functions(module):
            yield f"Explain what this Python function does and when to use it.\n\n```python\n{source}\n```"


def logic() -> Iterator[str]:
    """Riddles about families, islands, syllogisms and dates."""
    import reasoning_gym  # noqa: PLC0415 - takes 2 s, and nothing else needs it

    sets = [reasoning_gym.create_dataset(name, size=NUM_PUZZLES, seed=0) for name in PUZZLES]
    for entry in chain.from_iterable(zip_longest(*sets)):
        yield f"{entry['question'].strip()} Explain your reasoning."


OURS: dict[str, Callable[[], Iterator[str]]] = {"explain": explain, "logic": logic}

TUNED = prompts.DOMAINS
KEPT_OUT = tuple(OURS)
KINDS = (*TUNED, *KEPT_OUT)


@cache
def _catalogue(kind: str) -> tuple[str, ...]:
    texts = list(dict.fromkeys(OURS[kind]()))
    random.Random(kind).shuffle(texts)
    return tuple(texts)


def _functions(module: str) -> Iterator[str]:
    """Sources of its short functions and methods."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return  # modules leave the standard library now and then
    source = Path(spec.origin).read_text(encoding="utf-8")
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("__"):
            text = textwrap.dedent("\n".join(islice(lines, node.lineno - 1, node.end_lineno)))
            if MIN_LINES <= text.count("\n") + 1 <= MAX_LINES:
                yield text
