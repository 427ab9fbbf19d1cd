"""A run of `updraft-inference record`: the jobs of its sources, one after the other."""

from collections.abc import Iterator
from dataclasses import replace

from updraft_chassis.progress import Progress, Report
from updraft_inference.engine import Engine
from updraft_inference.recording.options import RecordOptions
from updraft_inference.recording.prompts import Prompts, count_lines
from updraft_inference.recording.recorder import Job, Recorder
from updraft_inference.recording.self_play import Conversation, SelfPlay


class RecordingRun:
    """Checks its sources when it is made, before an engine is started."""

    def __init__(self, options: RecordOptions, *, model_context: int) -> None:
        """InvalidInput if a source cannot be used. `model_context`: the longest request of the model, in tokens."""
        self._options = options
        self._conversation = Conversation(options.model) if options.num_self_play else None
        self._prompts: Prompts | None = None
        self._total = options.num_self_play
        longest = self._conversation.max_context if self._conversation else 0
        if options.prompts is not None:
            answers = replace(options.answers, max_context=min(options.answers.max_context, model_context))
            self._prompts = Prompts(options.prompts, options.model, answers)
            self._total += count_lines(options.prompts)
            longest = max(longest, answers.max_context)
        self.max_context = min(model_context, longest)

    async def record(self, engine: Engine, report: Report) -> None:
        """Record what the folder does not hold yet; see `Recorder.run`."""
        await Recorder(engine, self._options.folder, report).run(self._jobs(engine), self._total)
        if self._prompts and (note := self._prompts.summary()):
            report(Progress(activity="recording", done=self._total, total=self._total, note=note))

    def _jobs(self, engine: Engine) -> Iterator[Job | None]:
        if self._conversation:
            yield from SelfPlay(self._conversation, engine.info.eos_token_ids).jobs(self._options.num_self_play)
        if self._prompts:
            yield from self._prompts.jobs()
