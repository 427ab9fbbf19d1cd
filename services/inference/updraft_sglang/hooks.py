"""Where the plugin hooks into SGLang, and whether each hook really is where it must be.

SGLang logs a hook that does not fit and goes on without it, so after the start `problems` looks at what will be called.
"""

import inspect
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Hook = Callable[..., Any]

START = "sglang.srt.managers.scheduler.Scheduler.__init__"
FORWARD = "sglang.srt.speculative.eagle_worker_v2.EAGLEWorkerV2.forward_batch_generation"
VERIFY = "sglang.srt.speculative.eagle_utils.eagle_sample"
VERIFY_AS_CALLED = "sglang.srt.speculative.eagle_worker_common.eagle_sample"
PREFILL = "sglang.srt.model_executor.model_runner.ModelRunner.sample"
UPDATE = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater.update_weights_from_tensor"


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """A hook, the function that it goes around, the names by which that one is called, and its first parameters."""

    target: str
    hook: Hook
    parameters: tuple[str, ...]
    called_as: tuple[str, ...] = ()


def resolved(name: str) -> Any:
    """What a dotted name stands for now."""
    return pkgutil.resolve_name(name)


def problems(bindings: Sequence[Binding]) -> Iterator[str]:
    """A sentence for each hook that is not in place."""
    for binding in bindings:
        for name in (binding.target, *binding.called_as):
            problem = _problem(name, binding)
            if problem:
                yield problem
                break


def _problem(name: str, binding: Binding) -> str:
    try:
        function = resolved(name)
    except (ImportError, AttributeError) as error:
        return f"{name} is not there: {error}"
    layers = list(_layers(function))
    found = tuple(inspect.signature(layers[-1]).parameters)[: len(binding.parameters)]
    if found != binding.parameters:
        return f"{name} takes {', '.join(found)}; expected was {', '.join(binding.parameters)}"
    if not any(_holds(layer, binding.hook) for layer in layers):
        return f"{name} was not hooked"
    return ""


def _layers(function: Any) -> Iterator[Any]:
    """The function and all that it wraps, outermost first."""
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


def _holds(layer: Any, hook: Hook) -> bool:
    """Whether SGLang's wrapper calls our hook: it keeps it in its closure."""
    return any(cell.cell_contents is hook for cell in getattr(layer, "__closure__", None) or ())
