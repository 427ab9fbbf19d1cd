"""Identifies code by what it does: comments, docstrings and layout do not count.

A benchmark of hours keeps its runs under such a digest, so that they stay valid until the code that they depend on changes, not
until the next commit.
"""

import ast
import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path


def code_digest(modules: Sequence[str], followed: Sequence[str]) -> str:
    """Hexadecimal digest of these modules, and of all that they import from the modules and packages `followed`, directly or
    not. ModuleNotFoundError if one of `modules` does not exist."""
    sources: dict[str, str] = {}
    pending = list(modules)
    while pending:
        name = pending.pop()
        if name in sources:
            continue
        tree = _parsed(name)
        sources[name] = ast.dump(tree)
        pending += [one for one in _imported(tree) if _is_below(one, followed) and _is_module(one)]
    return hashlib.sha256(repr(sorted(sources.items())).encode()).hexdigest()


def _parsed(name: str) -> ast.Module:
    """Without strings that are statements, which are docstrings."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"there is no module {name}")
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [one for one in body if not _is_docstring(one)]  # type: ignore[attr-defined]
    return tree


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _imported(tree: ast.Module) -> Iterator[str]:
    """Names that may be modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _is_below(name: str, packages: Sequence[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the name is of something in a module
        return False
