"""The entry point that SGLang calls in each of its processes: registers the hooks, and starts where a scheduler starts.

Without UPDRAFT_SGLANG_SOCKET nothing is registered. One process sends: rank 0 of the tensor-parallel group in the last
pipeline stage. No source of SGLang is changed: hooks are its own way for plugins.
"""

import logging
import os
from importlib import metadata
from typing import Any

from updraft_sglang import __version__, hooks, wire
from updraft_sglang.capture import CaptureHooks, Hook
from updraft_sglang.channel import Channel
from updraft_sglang.hooks import Binding
from updraft_sglang.settings import Settings
from updraft_sglang.weights import answered, served

log = logging.getLogger(__name__)

KNOWN_VERSION = "0.5.23"


def register() -> None:
    """Called by SGLang."""
    settings = Settings.from_environment(os.environ)
    if settings is None:
        log.info("Updraft is not active: UPDRAFT_SGLANG_SOCKET is not set")
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType  # noqa: PLC0415  (only where it is active)

    for binding in Plugin(settings).bindings:
        HookRegistry.register(binding.target, binding.hook, HookType.AROUND)


class Plugin:
    """The hooks of one process."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._facts: dict[str, Any] = {"steps": 0, "aux_size": 0, "vocab_size": 0, "dtype": ""}
        self.channel = Channel(path=settings.socket, queue_bytes=settings.queue_bytes, hello=self._hello)
        capture = CaptureHooks(channel=self.channel, served=served, top_k=settings.top_k)
        self._of_capture = (
            Binding(target=hooks.FORWARD, hook=capture.forward, parameters=("self", "batch")),
            Binding(
                target=hooks.VERIFY,
                hook=capture.verify,
                parameters=("verify_input", "batch", "logits_output"),
                called_as=(hooks.VERIFY_AS_CALLED,),
            ),
            Binding(target=hooks.PREFILL, hook=capture.prefill, parameters=("self", "logits_output", "forward_batch")),
        )
        self._of_swap = Binding(target=hooks.UPDATE, hook=answered, parameters=("self", "named_tensors", "load_format"))
        self.bindings = (
            Binding(target=hooks.START, hook=self.start, parameters=("self",)),
            *self._of_capture,
            self._of_swap,
        )
        """All that is to be registered."""

    def start(self, original: Hook, scheduler: Any, *args: Any, **kwargs: Any) -> None:
        """AROUND Scheduler.__init__: once its workers are there, see whether all is in place, and connect."""
        original(scheduler, *args, **kwargs)
        try:
            for problem in hooks.problems((self._of_swap,)):
                log.error("Updraft: drafts that are refused cannot be reported (SGLang %s): %s", _sglang(), problem)
            if not _is_sender():
                return
            self.channel.problem = self._problem(scheduler)
        except Exception as error:  # noqa: BLE001  (it would end the server)
            self.channel.problem = f"the plugin could not start: {type(error).__name__}: {error}"
        self.channel.start()

    def _problem(self, scheduler: Any) -> str:
        """Why nothing can be captured; "" if it can."""
        unbound = list(hooks.problems(self._of_capture))
        if unbound:
            return f"hooks do not fit SGLang {_sglang()} (made for {KNOWN_VERSION}): {'; '.join(unbound)}"
        replicas = _replicas()
        if replicas:
            return replicas
        worker = scheduler.draft_worker
        own = getattr(type(worker), "forward_batch_generation", None)
        if own is not hooks.resolved(hooks.FORWARD):
            return f"only EAGLE3 shows what there is to learn from; this server speculates with {type(worker).__name__}"
        if not worker.speculative_algorithm.is_eagle3():
            return "only --speculative-algorithm EAGLE3 gives auxiliary hidden states"
        if worker.topk != 1:
            return f"only chains of drafts are captured: --speculative-eagle-topk must be 1, it is {worker.topk}"
        self._facts = _facts(worker)
        return ""

    def _hello(self) -> dict[str, Any]:
        return {
            "plugin": __version__,
            "sglang": _sglang(),
            "pid": os.getpid(),
            **self._facts,
            "version": served.version,
            "digest": served.digest,
        }


def _facts(worker: Any) -> dict[str, Any]:
    from sglang.srt.speculative.eagle_utils import get_draft_input_from_target_hidden_dim  # noqa: PLC0415  (SGLang's)

    config = worker.target_worker.model_runner.model_config
    return {
        "steps": int(worker.speculative_num_steps),
        "aux_size": int(get_draft_input_from_target_hidden_dim(worker.draft_worker.draft_runner)),
        "vocab_size": int(config.vocab_size),
        "dtype": wire.NAMES[config.dtype],
    }


def _sglang() -> str:
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return "of a version that nobody says"


def _is_sender() -> bool:
    parallel = _parallel()
    is_first = parallel.tp_rank == 0 and (parallel.dp_rank or 0) == 0
    return bool(is_first and parallel.pp_rank == parallel.pp_size - 1)


def _replicas() -> str:
    """Why several replicas in one server are not captured; "" if there is one."""
    parallel = _parallel()
    if parallel.attn_dp_size > 1:
        return "with data-parallel attention (--enable-dp-attention) nothing is captured"
    if parallel.dp_size > 1:
        return f"one server of {parallel.dp_size} replicas (--dp-size) is not captured: start one server for each"
    return ""


def _parallel() -> Any:
    from sglang.srt.runtime_context import get_parallel  # noqa: PLC0415  (SGLang's)

    return get_parallel()
