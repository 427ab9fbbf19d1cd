"""An SGLang plugin: keep the attention backend that speculation on a CPU needs.

Where the processor has no AMX, SGLang replaces `intel_amx` by a backend that cannot verify drafts. What `intel_amx` calls
is our stand-in, which needs no AMX.
"""

from collections.abc import Callable, Mapping
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

_FALLBACK = "sglang.srt.arg_groups.overrides._attention_backend_platform_fallbacks"


def register() -> None:
    """Called by SGLang in each of its processes."""
    HookRegistry.register(_FALLBACK, _keep_backend, HookType.AROUND)


def _keep_backend(original: Callable[[Any], Mapping[str, Any]], arguments: Any) -> Mapping[str, Any]:
    return {} if arguments.device == "cpu" else original(arguments)
