"""The functions of vLLM that the plugin hooks. vLLM has two model runners; a server uses one of them."""

ENGINE = "vLLM"
SCHEDULER = "vllm.v1.core.sched.scheduler.Scheduler"
ENGINE_CORE = "vllm.v1.engine.core.EngineCoreProc"
WORKER_STARTS = "vllm.v1.worker.worker_base.WorkerWrapperBase.initialize_from_config"
FIRST_RUNNER = "vllm.v1.worker.gpu_model_runner.GPUModelRunner"
SECOND_RUNNER = "vllm.v1.worker.gpu.model_runner.GPUModelRunner"
LENGTHS = "dynamic_sd_lookup"
"""The attribute of the scheduler with the number of draft tokens by the size of the batch; by default None."""
MIDDLEWARE = "vllm.entrypoints.launchers.app.init_entrypoints_middleware"
"""Under the name by which build_app calls it."""
GRPC = "vllm.entrypoints.launchers.grpc_server"
RUST = "VLLM_USE_RUST_FRONTEND"
"""The ways into vLLM that do not pass the middleware: a module, and a variable."""
CLIENT = "vllm.v1.engine.async_llm.AsyncLLM.__init__"
"""Each frontend of Python makes one, when vLLM has read its arguments."""

SENDS = (
    "vllm.v1.engine.core_client.AsyncMPClient.add_request_async",
    "vllm.v1.engine.core_client.DPAsyncMPClient.add_request_async",
)
"""The second one is that of several data-parallel ranks."""
