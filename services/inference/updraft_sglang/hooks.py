"""The functions of SGLang that the plugin hooks, and a check that each hook is in place.

SGLang logs a hook that does not fit and continues without it, so after startup `problems` checks what will be called.
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
    """A hook, the function that it wraps, the names under which that function is called, and its first parameters."""

    target: str
    hook: Hook
    parameters: tuple[str, ...]
    called_as: tuple[str, ...] = ()


def resolved(name: str) -> Any:
    """The object that a dotted name refers to now."""
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
        return f"{name} does not exist: {error}"
    layers = list(_layers(function))
    parameters = tuple(inspect.signature(layers[-1]).parameters)[: len(binding.parameters)]
    if parameters != binding.parameters:
        return f"{name} takes {', '.join(parameters)}; expected {', '.join(binding.parameters)}"
    if not any(_holds(layer, binding.hook) for layer in layers):
        return f"{name} is not hooked"
    return ""


def _layers(function: Any) -> Iterator[Any]:
    """The function and all functions that it wraps, outermost first."""
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


def _holds(layer: Any, hook: Hook) -> bool:
    """Whether SGLang's wrapper calls our hook, which is in its closure."""
    return any(cell.cell_contents is hook for cell in getattr(layer, "__closure__", None) or ())
