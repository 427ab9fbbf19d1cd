"""Prompts that come with installed packages: HumanEval and CodeI/O (Python), GSM-Symbolic (mathematics)."""

import gzip
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from updraft_chassis.errors import NotFound

_INSTALL = "pip install '.[local]'"

_NUM_MATH = 2000
"""From 100 templates: more would repeat stories with other numbers."""

_MAX_CODE_CHARS = 900
_MAX_TASK_CHARS = 250
"""Short to read, as chat requests are; and short tasks keep HumanEval a good part of the code domain."""

_MATH_SUFFIX = " Give the result as your final answer. Do not include units."


def code() -> list[str]:
    """Return requests to complete a Python function, from its signature and docstring."""
    functions = [*_human_eval(), *_codeio()]
    return [
        f"Complete this Python function.\n\n```python\n{function.strip()}\n```"
        for function in functions
        if len(function) <= _MAX_CODE_CHARS
    ]


def math() -> list[str]:
    """Return grade-school mathematics problems told as a story."""
    _folder("reasoning_gym")
    import reasoning_gym  # noqa: PLC0415 - takes 2 s, and nothing else needs it

    dataset = reasoning_gym.create_dataset("gsm_symbolic", size=_NUM_MATH, seed=0)
    stories = (str(entry["question"]).removesuffix(_MATH_SUFFIX) for entry in dataset)
    return [f"{story} Explain each step." for story in stories]


def _human_eval() -> Iterator[str]:
    for row in _rows(_folder("human_eval") / "data" / "HumanEval.jsonl.gz"):
        yield row["prompt"]


def _codeio() -> Iterator[str]:
    """Yield the signature and the task of each row, in the form of HumanEval."""
    for row in _rows(_folder("reasoning_gym") / "data" / "codeio.jsonl.gz"):
        parameters = re.search(r"^def main_solution\(([^()]*)\)", row["code_sample"], re.MULTILINE)
        if parameters and len(row["task_description"]) <= _MAX_TASK_CHARS:
            yield f'def solution({parameters[1]}):\n    """{row["task_description"]}"""'


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield json.loads(line)


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise NotFound(f"these prompts need the package {package}: run `{_INSTALL}` in a checkout")
    return Path(spec.origin).parent
