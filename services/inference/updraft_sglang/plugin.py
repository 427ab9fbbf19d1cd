"""The entry point that SGLang calls in each of its processes: registers the hooks, and starts capture with the scheduler.

Without UPDRAFT_SGLANG_SOCKET nothing is registered. One process sends: rank 0 of the tensor-parallel group in the last
pipeline stage. SGLang is not patched; hooks are its own mechanism for plugins.
"""

import logging
import os
from importlib import metadata
from typing import Any

from updraft_sglang import names
from updraft_sglang.capture import CaptureHooks
from updraft_sglang.weights import answered, served, share_vocabulary
from updraft_tap import __version__, hooks, wire
from updraft_tap.channel import Channel
from updraft_tap.hooks import Binding, Hook
from updraft_tap.settings import Settings

log = logging.getLogger(__name__)

ENGINE = "SGLang"
KNOWN_VERSION = "0.5.23"
PREFIX = "UPDRAFT_SGLANG_"


def register() -> None:
    settings = Settings.from_environment(os.environ, PREFIX)
    if settings is None:
        log.info("Updraft is inactive because UPDRAFT_SGLANG_SOCKET is not set")
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType  # noqa: PLC0415  (only if active)

    for binding in Plugin(settings).bindings:
        HookRegistry.register(binding.target, binding.hook, HookType.AROUND)


class Plugin:
    def __init__(self, settings: Settings) -> None:
        self._facts: dict[str, Any] = {
            "ranks": {},
            "hooks": {},
            "device": "",
            "steps": 0,
            "aux_size": 0,
            "vocab_size": 0,
            "dtype": "",
        }
        self.channel = Channel(path=settings.socket, queue_bytes=settings.queue_bytes, hello=self._hello)
        capture = CaptureHooks(channel=self.channel, served=served, top_k=settings.top_k)
        self._of_capture = (
            Binding(target=names.FORWARD, hook=capture.forward, parameters=("self", "batch")),
            Binding(
                target=names.VERIFY,
                hook=capture.verify,
                parameters=("verify_input", "batch", "logits_output"),
                called_as=(names.VERIFY_AS_CALLED,),
            ),
            Binding(target=names.PREFILL, hook=capture.prefill, parameters=("self", "logits_output", "forward_batch")),
        )
        self._of_swap = Binding(target=names.UPDATE, hook=answered, parameters=("self", "named_tensors", "load_format"))
        self.bindings = (
            Binding(target=names.START, hook=self.start, parameters=("self",)),
            *self._of_capture,
            self._of_swap,
        )
        """All hooks to register."""

    def start(self, original: Hook, scheduler: Any, *args: Any, **kwargs: Any) -> None:
        """AROUND Scheduler.__init__: once its workers exist, share the draft's vocabulary, check the hooks and connect."""
        original(scheduler, *args, **kwargs)
        try:
            share_vocabulary(scheduler.draft_worker)
        except AttributeError as error:
            log.error("Updraft cannot exchange draft vocabularies (SGLang %s): %s", _sglang(), error)
        try:
            if not _is_sender():
                return
            self.channel.problem = self._problem(scheduler)
        except Exception as error:  # noqa: BLE001  (it would crash the server)
            self.channel.problem = f"the plugin could not start: {type(error).__name__}: {error}"
        try:
            self._facts |= {"ranks": _ranks(), "hooks": hooks.states(self.bindings)}
            for problem in hooks.problems((self._of_swap,)):
                log.error("Updraft cannot report refused drafts (SGLang %s): %s", _sglang(), problem)
        except Exception:  # see above; capture does not need the facts
            log.exception("Updraft cannot describe the server (SGLang %s)", _sglang())
        self.channel.start()

    def _problem(self, scheduler: Any) -> str:
        """Why nothing can be captured; "" if it can."""
        unbound = list(hooks.problems(self._of_capture))
        if unbound:
            return f"hooks do not fit SGLang {_sglang()} (tested with {KNOWN_VERSION}): {'; '.join(unbound)}"
        replicas = _replicas()
        if replicas:
            return replicas
        worker = scheduler.draft_worker
        own = getattr(type(worker), "forward_batch_generation", None)
        if own is not hooks.resolved(names.FORWARD):
            return f"capture requires EAGLE3, but this server speculates with {type(worker).__name__}"
        if not worker.speculative_algorithm.is_eagle3():
            return "capture requires --speculative-algorithm EAGLE3, for its auxiliary hidden states"
        if worker.topk != 1:
            return f"capture requires --speculative-eagle-topk 1, but it is {worker.topk}"
        self._facts |= _facts(worker)
        return ""

    def _hello(self) -> dict[str, Any]:
        return {
            "tap": __version__,
            "engine": {"name": ENGINE, "version": _sglang()},
            "pid": os.getpid(),
            **self._facts,
            "version": served.version,
            "digest": served.digest,
        }


def _facts(worker: Any) -> dict[str, Any]:
    from sglang.srt.speculative.eagle_utils import get_draft_input_from_target_hidden_dim  # noqa: PLC0415  (SGLang's)

    config = worker.target_worker.model_runner.model_config
    return {
        "device": str(worker.target_worker.model_runner.device),
        "steps": int(worker.speculative_num_steps),
        "aux_size": int(get_draft_input_from_target_hidden_dim(worker.draft_worker.draft_runner)),
        "vocab_size": int(config.vocab_size),
        "dtype": wire.NAMES[config.dtype],
    }


def _sglang() -> str:
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return "of unknown version"


def _is_sender() -> bool:
    parallel = _parallel()
    is_first = parallel.tp_rank == 0 and (parallel.dp_rank or 0) == 0
    return bool(is_first and parallel.pp_rank == parallel.pp_size - 1)


def _replicas() -> str:
    parallel = _parallel()
    if parallel.attn_dp_size > 1:
        return "capture does not support data-parallel attention (--enable-dp-attention)"
    if parallel.dp_size > 1:
        return f"capture does not support {parallel.dp_size} replicas in one server (--dp-size): start one server per replica"
    return ""


def _ranks() -> dict[str, int]:
    parallel = _parallel()
    return {"tensor": int(parallel.tp_size), "pipeline": int(parallel.pp_size), "data": int(parallel.dp_size)}


def _parallel() -> Any:
    from sglang.srt.runtime_context import get_parallel  # noqa: PLC0415  (SGLang's)

    return get_parallel()
