"""Hooks around an engine's functions: a check that each is in place, and a guard that keeps their errors from the engine.

An engine that logs a hook that does not fit and continues without it would leave capture silently dead, so after startup
`problems` checks what will be called.
"""

import functools
import inspect
import logging
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Hook = Callable[..., Any]
"""Called with the original function and its arguments; calls the original once."""

RAISES = 3
"""A hook that raised this many times is not run any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """A hook, the function that it wraps, the names under which that function is called, and its first parameters."""

    target: str
    hook: Hook
    parameters: tuple[str, ...]
    called_as: tuple[str, ...] = ()


class Guard:
    """Runs the bodies of hooks. Errors never reach the engine, and a body that keeps raising is unhooked.

    `failed` is told each error, and `unhooked` the name of the body and a sentence, once.
    """

    def __init__(self, *, failed: Callable[[Exception], None], unhooked: Callable[[str, str], None]) -> None:
        self.unhooked: dict[str, str] = {}
        """The sentences by body."""
        self._failed = failed
        self._unhooked = unhooked
        self._raised: Counter[str] = Counter()

    def __call__(self, name: str, body: Callable[..., Any], *args: Any) -> Any:
        """The value of `body(*args)`; None if it raised or is unhooked."""
        if self._raised.get(name, 0) >= RAISES:  # a Counter makes the zeros of others in Python
            return None
        try:
            return body(*args)
        except Exception as error:  # noqa: BLE001  (it would crash the server)
            self._raised[name] += 1
            self._failed(error)
            if self._raised[name] == RAISES:
                reason = (
                    f"the hook {name} raised {RAISES} times and is unhooked, the last: {type(error).__name__}: {error}"
                )
                self.unhooked[name] = reason
                self._unhooked(name, reason)
            return None


def logged_guard(log: logging.Logger, what: str) -> Guard:
    """A guard that only logs, for hooks without which everything is captured as before."""
    return Guard(
        failed=lambda error: log.error("Updraft %s: %s: %s", what, type(error).__name__, error),
        unhooked=lambda _, reason: log.error("Updraft: %s", reason),
    )


def resolved(name: str) -> Any:
    """The object that a dotted name refers to now."""
    return pkgutil.resolve_name(name)


def install(bindings: Sequence[Binding]) -> dict[str, str]:
    """Wrap functions of an engine that has no mechanism of its own for that, unless they are not what is expected.

    By target, a sentence why it was left alone; "" if it is hooked.
    """
    return {binding.target: _install(binding) for binding in bindings}


def _install(binding: Binding) -> str:
    problem = _misfit(binding.target, binding)
    if not problem:
        owner_name, _, name = binding.target.rpartition(".")
        owner = resolved(owner_name)
        setattr(owner, name, _around(getattr(owner, name), binding.hook))
    return problem


def _around(original: Callable[..., Any], hook: Hook) -> Callable[..., Any]:
    @functools.wraps(original)
    def hooked(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    return hooked


def states(bindings: Sequence[Binding]) -> dict[str, str]:
    """By target, a sentence why the hook is not in place; "" if it is."""
    return {binding.target: _first_problem(binding) for binding in bindings}


def problems(bindings: Sequence[Binding]) -> Iterator[str]:
    """A sentence for each hook that is not in place."""
    return filter(None, map(_first_problem, bindings))


def _first_problem(binding: Binding) -> str:
    names = (binding.target, *binding.called_as)
    return next(filter(None, (_problem(name, binding) for name in names)), "")


def _problem(name: str, binding: Binding) -> str:
    problem = _misfit(name, binding)
    if not problem and not any(_holds(layer, binding.hook) for layer in _layers(resolved(name))):
        return f"{name} is not hooked"
    return problem


def _misfit(name: str, binding: Binding) -> str:
    try:
        function = resolved(name)
    except (ImportError, AttributeError) as error:
        return f"{name} does not exist: {error}"
    *_, innermost = _layers(function)
    parameters = tuple(inspect.signature(innermost).parameters)[: len(binding.parameters)]
    if parameters != binding.parameters:
        return f"{name} takes {', '.join(parameters)}; expected {', '.join(binding.parameters)}"
    return ""


def _layers(function: Any) -> Iterator[Any]:
    """The function and all functions that it wraps, outermost first."""
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


def _holds(layer: Any, hook: Hook) -> bool:
    """Whether the wrapper calls our hook, which is in its closure."""
    return any(cell.cell_contents is hook for cell in getattr(layer, "__closure__", None) or ())
