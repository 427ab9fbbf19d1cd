import functools
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from updraft_tap.hooks import Binding, Guard, install, problems, states


def ours(original: Callable[..., Any], *args: Any) -> Any:
    return original(*args)


def around(original: Callable[..., Any], hook: Callable[..., Any]) -> Callable[..., Any]:
    """As SGLang wraps."""

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    return wrapper


def sample(verify_input: Any, batch: Any, mask: Any = None) -> Any:
    return verify_input, batch, mask


@pytest.fixture
def engine() -> Iterator[Any]:
    module = ModuleType("an_engine")
    sys.modules["an_engine"] = module
    yield module
    del sys.modules["an_engine"]


def binding(target: str = "an_engine.sample", *called_as: str) -> Binding:
    return Binding(target=target, hook=ours, parameters=("verify_input", "batch"), called_as=called_as)


def test_a_hook_in_place_is_no_problem_also_below_another_plugins(engine: Any) -> None:
    engine.sample = around(around(sample, ours), lambda original, *args: original(*args))

    assert list(problems([binding()])) == []


def test_a_hook_that_was_not_applied_is_named(engine: Any) -> None:
    engine.sample = around(sample, lambda original, *args: original(*args))

    assert list(problems([binding()])) == ["an_engine.sample is not hooked"]


def test_a_hook_that_another_name_bypasses_is_named(engine: Any) -> None:
    engine.sample, engine.imported = around(sample, ours), sample

    assert list(problems([binding("an_engine.sample", "an_engine.imported")])) == ["an_engine.imported is not hooked"]


def test_other_parameters_are_named(engine: Any) -> None:
    engine.sample = around(lambda logits, batch: (logits, batch), ours)

    assert list(problems([binding()])) == ["an_engine.sample takes logits, batch; expected verify_input, batch"]


@pytest.mark.parametrize("target", ["an_engine.missing", "no_such_engine.sample"])
def test_what_is_not_there_is_named(engine: Any, target: str) -> None:
    assert engine
    (problem,) = problems([binding(target)])
    assert problem.startswith(f"{target} does not exist")


def test_the_state_of_every_hook_is_told_by_its_function(engine: Any) -> None:
    engine.sample = around(sample, ours)

    assert states([binding(), binding("an_engine.missing")]) == {
        "an_engine.sample": "",
        "an_engine.missing": "an_engine.missing does not exist: module 'an_engine' has no attribute 'missing'",
    }


def test_a_body_that_raises_three_times_is_not_run_again_and_others_are() -> None:
    errors: list[Exception] = []
    unhooked: list[tuple[str, str]] = []
    runs: list[int] = []
    guard = Guard(failed=errors.append, unhooked=lambda *what: unhooked.append(what))

    def body(value: int) -> int:
        runs.append(value)
        if value % 2:
            raise ValueError(f"{value} is odd")
        return value

    assert [guard("rows", body, value) for value in (2, 1, 4, 3, 5, 6, 7)] == [2, None, 4, None, None, None, None]
    assert guard("steps", body, 8) == 8
    assert runs == [2, 1, 4, 3, 5, 8]
    assert [str(error) for error in errors] == ["1 is odd", "3 is odd", "5 is odd"]
    assert unhooked == [("rows", "the hook rows raised 3 times and is unhooked, the last: ValueError: 5 is odd")]


def test_a_function_is_wrapped_where_it_is_and_one_that_does_not_fit_is_left_alone(engine: Any) -> None:
    calls: list[tuple[Any, ...]] = []

    def hook(original: Callable[..., Any], *args: Any) -> Any:
        calls.append(args)
        return original(*args)

    class Runner:
        def step(self, output: int) -> int:
            return output + 1

    engine.Runner, engine.sample = Runner, sample
    fits = Binding(target="an_engine.Runner.step", hook=hook, parameters=("self", "output"))
    misfit = Binding(target="an_engine.sample", hook=hook, parameters=("logits",))

    found = install([fits, misfit])

    runner = Runner()
    assert found == {
        "an_engine.Runner.step": "",
        "an_engine.sample": "an_engine.sample takes verify_input; expected logits",
    }
    assert (runner.step(2), calls, engine.sample) == (3, [(runner, 2)], sample)
    assert list(problems([fits])) == []
