"""The functions of SGLang that the plugin hooks."""

START = "sglang.srt.managers.scheduler.Scheduler.__init__"
FORWARD = "sglang.srt.speculative.eagle_worker_v2.EAGLEWorkerV2.forward_batch_generation"
VERIFY = "sglang.srt.speculative.eagle_utils.eagle_sample"
VERIFY_AS_CALLED = "sglang.srt.speculative.eagle_worker_common.eagle_sample"
PREFILL = "sglang.srt.model_executor.model_runner.ModelRunner.sample"
UPDATE = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater.update_weights_from_tensor"
