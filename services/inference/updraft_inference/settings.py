"""Settings of the inference process (UPDRAFT_INFERENCE_*)."""

import socket
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import SettingsConfigDict

from updraft_artifacts.draft_shape import MIN_VOCAB, ShapeChoice
from updraft_chassis import settings, streams
from updraft_chassis.credentials import Credentials, ServerTls

PodName = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$", max_length=63)]
"""A valid host name."""

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Bytes = Annotated[int, Field(ge=1024)]


class InferenceSettings(settings.Settings):
    """Settings of one pod: engine, HTTP server and agent."""

    model_config = SettingsConfigDict(env_prefix="UPDRAFT_INFERENCE_")

    model: Path
    """Folder of the target model in Hugging Face layout: config.json, safetensors, tokenizer.json."""

    served_model_name: str = ""
    """Model name that clients use; default: the name of the model folder."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all interfaces."""

    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port of the OpenAI API, /healthz, /readyz and /metrics; of an SGLang or vLLM server, if Updraft starts one. 0 picks a
    free port, but not for such a server."""

    tls_cert_file: Path | None = None
    """Certificate chain of `port` in PEM format; with tls_key_file, clients have to speak TLS. Both are read again when they
    change. A server that Updraft starts gets the same files."""

    tls_key_file: Path | None = None
    """Private key of tls_cert_file."""

    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 9093
    """Port of the agent's /healthz, /readyz and /metrics, with engines sglang and vllm; 0 picks a free port."""

    metrics_tls_cert_file: Path | None = None
    """Certificate chain of metrics_port in PEM format; with metrics_tls_key_file, it speaks HTTPS. Reloaded when it changes."""

    metrics_tls_key_file: Path | None = None
    """Private key of metrics_tls_cert_file."""

    engine: Literal["torch", "sglang", "vllm"] = "torch"
    """Engine that runs the model: torch (built in), or a stock SGLang or vLLM server. With a server, clients use its own port,
    and this process is the agent beside it."""

    vllm_socket: Path | None = None
    """Unix socket to which Updraft's plugin in the vLLM server connects; default: vllm.sock in data_dir."""

    initial_draft: Path | None = None
    """Folder of the draft that a server started with, under the server's path. The server returns to this draft when no version
    serves. Without this setting, it needs a restart to return to it."""

    vllm_python: Path | None = None
    """Python interpreter of an environment with vLLM. With it, Updraft starts a server on `port`, which stops with this
    process. Without it, the agent waits for your own server."""

    vllm_args: str = ""
    """Extra arguments for the vLLM server, in shell syntax; they override those that Updraft sets."""

    vllm_restarts: bool = False
    """Whether to restart a vLLM server that Updraft started if a draft has another shape; see sglang_restarts."""

    attach: str = ""
    """URL of a running SGLang server. Needed only for several tensor-parallel ranks, whose drafts Updraft swaps over HTTP."""

    sglang_python: Path | None = None
    """Python interpreter of an environment with SGLang. With it, Updraft starts a server on `port`, which stops with this
    process. Without it, the agent waits for your own server."""

    sglang_args: str = ""
    """Extra arguments for the SGLang server, in shell syntax; they override those that Updraft sets."""

    sglang_admin_key: SecretStr = SecretStr("")
    """The SGLang server's --admin-api-key, which the agent sends with its requests. A server that Updraft starts reads it from
    a file in data_dir."""

    sglang_admin_key_file: Path | None = None
    """File with the admin key, written by `updraft-inference prepare-sglang --admin-key-file`; sglang_admin_key overrides it.
    Passed as --config to a server that Updraft starts, so the name must end in .yaml. Default: a file with a random key in
    data_dir."""

    sglang_socket: Path | None = None
    """Unix socket to which Updraft's plugin in the SGLang server connects; default: sglang.sock in data_dir."""

    sglang_restarts: bool = False
    """Whether to restart an SGLang server that Updraft started if a draft has another shape, because SGLang builds the draft's
    network only at startup. Running requests finish first. If false, such a draft waits until someone starts the server with
    it; the pod keeps the current draft and reports why."""

    draft_num_attention_heads: int | None = Field(default=None, ge=1)
    """Attention heads of a server's initial draft. This setting and the next three must equal the trainer's
    (UPDRAFT_TRAINER_DRAFT_...); by default, all derive from the target."""

    draft_num_key_value_heads: int | None = Field(default=None, ge=1)
    """Key-value heads of the initial draft."""

    draft_intermediate_size: int | None = Field(default=None, ge=1)
    """MLP width of the initial draft."""

    draft_vocab_size: int | None = Field(default=None, ge=MIN_VOCAB)
    """Vocabulary size of the initial draft."""

    draft_config: str = ""
    """config.json of a published draft. `prepare-sglang` and `prepare-vllm` take the initial draft's sizes from it instead of
    the four settings above."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the target model. With float32, greedy output is bit-equal with every draft."""

    device: str = "cpu"
    """Device of the torch engine: cpu, cuda, cuda:0. The engine does not start if torch cannot use it. The operator sets cuda
    if spec.serving.resources request a GPU."""

    kernels: Literal["auto", "off"] = "auto"
    """Whether the torch engine uses its C++ kernels on a CPU. auto: the fastest that the package has for this CPU; off:
    torch's slower operations."""

    num_threads: Annotated[int, Field(ge=0)] = 0
    """Threads that torch uses; 0: torch's default."""

    num_slots: Count = 8
    """Requests that run at the same time; each one reserves a KV cache of max_context tokens. A sampled one with a seed keeps
    four bytes more per entry of the vocabulary for each draft token of a step."""

    max_context: Count = 2048
    """Maximum tokens per request, prompt and output together; by default also limited by the model's own maximum."""

    max_queued_requests: Annotated[int, Field(ge=0)] = 256
    """Requests that may wait for a slot; further requests get status 429."""

    api_keys_file: Path | None = None
    """File with the API keys of clients, one per line, each with the name of its tenant before it; read again when it changes.
    Without it, no key is required."""

    tenant_header: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]*$", max_length=128)] = ""
    """Header that names the tenant of a request, set by a gateway that you trust. With keys, it counts only for a key with the
    word gateway."""

    max_requests_per_key: Annotated[int, Field(ge=0)] = 0
    """Maximum concurrent requests per API key; each choice of `n` counts. Further requests get status 429. 0: no limit."""

    max_body_bytes: Bytes = 1024 * 1024
    """Maximum size of a request body."""

    max_connections: Count = 512
    """Maximum requests that are read or answered concurrently; further requests get status 429, idle connections are closed,
    and probes are still answered. Keep it above num_slots + max_queued_requests and below the limit of open files."""

    stall_seconds: Annotated[float, Field(gt=0)] = 30.0
    """How long a client may take to send its request, or leave its answer unread, before it is disconnected and its
    request cancelled."""

    drain_seconds: Annotated[float, Field(ge=0)] = 30.0
    """How long running requests may continue after SIGTERM. Keep it below the pod's termination grace period."""

    drafter: Literal["auto", "none", "ngram", "eagle3", "hybrid"] = "auto"
    """Default drafter of requests. hybrid: n-gram lookup and the draft model, mixed token by token; lookup alone before there
    is a draft. auto: hybrid with engine torch, eagle3 with a server. Engine torch drafts nothing where that is faster."""

    lookahead: Annotated[int, Field(ge=0, le=16)] = 3
    """Maximum draft tokens per verify step; the engine chooses up to this number."""

    remembered_tokens: Annotated[int, Field(ge=0, le=2**20)] = 65536
    """Tokens of earlier answers that n-gram lookup remembers for each of the last 16 API keys, or for all clients
    together if there are no keys; 80 bytes per token. 0: lookup uses only the request's own text."""

    draft_path: Path | None = None
    """A fixed draft (checkpoint folder) instead of drafts from the registry."""

    registry_address: str = ""
    """host:port of the registry; if empty, the draft never changes."""

    registry_token_file: Path | None = None
    """File with the token of role serve that authenticates this pod to the registry; read again when it changes."""

    registry_ca_file: Path | None = None
    """CA certificates of the registry in PEM format; enables TLS. Reloaded when it changes."""

    registry_cert_file: Path | None = None
    """Client certificate of this process, for a registry that requires mTLS. Reloaded when it changes."""

    registry_key_file: Path | None = None
    """Private key of registry_cert_file."""

    speculator: settings.Name = "default"
    """Name of the speculator, the line of drafts that this pod serves."""

    namespace: settings.StreamNamespace = "default"
    """Start of stream keys, so that several installations can share one Redis: NAMESPACE or INSTALLATION:NAMESPACE."""

    pod_name: PodName = Field(default_factory=lambda: socket.gethostname()[:63].strip("._-") or "pod")
    """Name of this pod, unique within a speculator; default: the host name."""

    report_seconds: Annotated[float, Field(gt=0)] = 2.0
    """Interval of reports to the registry; changes are reported immediately."""

    redis_url: SecretStr = SecretStr("")
    """Redis with the trace streams: redis://host:port/db, redis+cluster://host:port or unix:///path; rediss:// and
    rediss+cluster:// with TLS. If empty, nothing is captured."""

    stream_shards: Annotated[int, Field(ge=1, le=streams.MAX_SHARDS)] = 1
    """Number of trace streams, at least the ranks of the trainer; must equal UPDRAFT_TRAINER_STREAM_SHARDS."""

    capture: Literal["all", "opt-in"] = "all"
    """Which requests are captured: all whose senders do not opt out, or only those that opt in (X-Updraft-Capture: on, or this
    word after their API key)."""

    capture_retention_seconds: Annotated[int | None, Field(ge=60)] = None
    """Age at which traces are deleted from the streams. By default only the streams' size limits it."""

    capture_payload_fraction: Fraction = 1.0
    """Maximum fraction of requests whose traces include hidden states for training. Fewer do if the trainer can use less."""

    capture_evaluation_fraction: Fraction = 0.1
    """Fraction of requests that are held out for evaluation. They are more likely than others to have hidden states."""

    capture_train: bool = True
    """Whether requests may be trained on. If not, drafts are not judged by them either. A request can only permit less:
    X-Updraft-Capture: no-train."""

    capture_retain: bool = True
    """Whether the trainer may store requests, without which it cannot learn from them. A request can only permit less:
    X-Updraft-Capture: no-retain."""

    capture_region: Annotated[str, Field(max_length=63)] = ""
    """Region in which traces may be stored; a trainer of another UPDRAFT_TRAINER_REGION refuses them."""

    capture_prompt_rows: Annotated[int, Field(ge=0)] = 512
    """Maximum positions at the end of the prompt whose hidden states are captured: context, which serving gives the draft too.
    A wide model's are fewer: at most half of a chunk of 4 MiB, or of a smaller one if streams are small."""

    capture_counterfactual_rows: Annotated[int, Field(ge=0, le=16)] = 0
    """Maximum rows per verify step to capture after a rejected draft token; the trainer uses them only with a discard
    weight. 0: none."""

    capture_encoding: Literal["fp8", "bf16"] = "fp8"
    """Encoding of hidden states: fp8 halves the size, with a relative error of about 6 %."""

    capture_running_bytes: Annotated[int | None, Field(ge=1024)] = None
    """Memory for the captured rows of running requests, with engines sglang and vllm; rows beyond it are lost and counted. The
    default is 1 GiB."""

    capture_queue_entries: Count = 64
    """Traces that may wait for Redis; further traces are dropped and counted."""

    capture_queue_bytes: Annotated[int | None, Field(ge=1024)] = None
    """Memory for waiting traces; a single larger trace may wait alone. The default is enough for eight requests of this
    target, as `updraft size` shows."""

    capture_max_bytes: Annotated[int | None, Field(ge=1024)] = None
    """Size of all streams in Redis together; the oldest traces are removed first. By default five minutes of 200 captured
    tokens per second of this target, as `updraft size` shows. Below 8 MiB per stream, chunks of requests are smaller than
    4 MiB: half of a stream."""

    data_dir: Path = Field(default_factory=lambda: Path.home() / ".local/share/updraft/inference")
    """Folder for drafts and the record of the last draft; default: ~/.local/share/updraft/inference."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Minimum severity of log records."""

    log_format: Literal["json", "text"] = "json"
    """json for machines, text for people."""

    @property
    def registry_credentials(self) -> Credentials:
        return Credentials.of(self)

    @property
    def tls(self) -> ServerTls | None:
        """The certificate of `port`; None for plain HTTP."""
        if self.tls_cert_file is None or self.tls_key_file is None:
            return None
        return ServerTls(cert_file=self.tls_cert_file, key_file=self.tls_key_file)

    @property
    def model_name(self) -> str:
        return self.served_model_name or self.model.resolve().name

    @property
    def stream_keys(self) -> list[str]:
        return streams.keys(self.namespace, self.speculator, self.stream_shards)

    @property
    def shape(self) -> ShapeChoice:
        """The shape of a server's initial draft."""
        return ShapeChoice(**{field.name: getattr(self, field.name) for field in fields(ShapeChoice)})

    @property
    def socket_path(self) -> Path:
        """Socket to which the plugin in the server connects."""
        socket = self.vllm_socket if self.engine == "vllm" else self.sglang_socket
        return socket or self.data_dir / f"{self.engine}.sock"

    @property
    def server_python(self) -> Path | None:
        """The interpreter to start the server with; None if someone else starts it."""
        return {"sglang": self.sglang_python, "vllm": self.vllm_python}.get(self.engine)

    @property
    def draft_folder(self) -> Path:
        """Where the drafts of the speculator are kept, by version."""
        return self.data_dir / "drafts" / self.speculator

    @model_validator(mode="after")
    def _check_engine(self) -> Self:
        if self.engine != "sglang" and self.attach:
            raise ValueError("ATTACH requires ENGINE sglang")
        if self.engine != "torch" and self.drafter not in ("auto", "eagle3"):
            raise ValueError(f"DRAFTER {self.drafter} requires ENGINE torch: servers use eagle3 for all requests")
        if self.engine != "vllm" and self.vllm_python is not None:
            raise ValueError("VLLM_PYTHON requires ENGINE vllm")
        if self.engine != "torch" and (
            self.draft_path is not None or self.api_keys_file is not None or self.tenant_header
        ):
            raise ValueError(
                "DRAFT_PATH, API_KEYS_FILE and TENANT_HEADER require ENGINE torch:"
                f" with {self.engine}, clients use the server's own port"
            )
        return self

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("TLS_CERT_FILE and TLS_KEY_FILE require each other")
        if (self.metrics_tls_cert_file is None) != (self.metrics_tls_key_file is None):
            raise ValueError("METRICS_TLS_CERT_FILE and METRICS_TLS_KEY_FILE require each other")
        if self.metrics_tls_cert_file is not None and self.engine == "torch":
            raise ValueError(
                "METRICS_TLS_CERT_FILE requires ENGINE sglang or vllm: torch has metrics on the port of clients"
            )
        if self.tls is not None and self.engine != "torch" and self.server_python is None:
            raise ValueError(
                "TLS_CERT_FILE requires ENGINE torch or a server that Updraft starts: yours has its own port"
            )
        return self

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        if self.max_requests_per_key and self.api_keys_file is None:
            raise ValueError(
                "MAX_REQUESTS_PER_KEY requires API_KEYS_FILE: without keys, clients cannot be distinguished"
            )
        return self

    @model_validator(mode="after")
    def _check_draft_source(self) -> Self:
        if self.draft_path is not None and self.registry_address:
            raise ValueError("DRAFT_PATH and REGISTRY_ADDRESS are mutually exclusive: a fixed draft is never swapped")
        return self
