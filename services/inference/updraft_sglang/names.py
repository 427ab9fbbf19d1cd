"""The functions of SGLang that the plugin hooks."""

ENGINE = "SGLang"
SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
START = f"{SCHEDULER}.__init__"
STREAM = "sglang.srt.managers.scheduler_components.output_streamer.SchedulerOutputStreamer.stream_output"
JUDGE = (
    "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
    "._resolve_spec_v2_tokens"
)
UPDATES = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"

FORWARD = "sglang.srt.speculative.eagle_worker_v2.EAGLEWorkerV2.forward_batch_generation"
VERIFY = "sglang.srt.speculative.eagle_utils.eagle_sample"
VERIFY_AS_CALLED = "sglang.srt.speculative.eagle_worker_common.eagle_sample"
PREFILL = "sglang.srt.model_executor.model_runner.ModelRunner.sample"
UPDATE = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater.update_weights_from_tensor"

ARGUMENTS = "sglang.srt.server_args.ServerArgs.resolve_once"
"""Each way to start a server calls it first."""
CONFIGURATION = "sglang.srt.server_args.ServerArgs.resolved_dict"
"""The configuration as a server shows it to everybody, also at /server_info."""
MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
HTTP = "sglang.srt.entrypoints.http_server"
"""The module of the HTTP application; only processes that serve HTTP import it."""
RUST = "SGLANG_RUST_SERVER"
"""With this variable, SGLang's HTTP server is not in Python."""
APP_PATH = "SGLANG_HTTP_SERVER_APP_PATH"
"""The variable that names the application that each of several HTTP processes imports."""
