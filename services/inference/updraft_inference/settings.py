"""Settings of the inference process (UPDRAFT_INFERENCE_*)."""

import socket
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import SettingsConfigDict

from updraft_chassis import settings, streams
from updraft_chassis.credentials import Credentials

PodName = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$", max_length=63)]
"""What a host may be called."""

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Bytes = Annotated[int, Field(ge=1024)]


class InferenceSettings(settings.Settings):
    """One pod: an engine, its HTTP surface and its agent."""

    model_config = SettingsConfigDict(env_prefix="UPDRAFT_INFERENCE_")

    model: Path
    """Folder of the target in Hugging Face layout: config.json, safetensors, tokenizer.json."""

    served_model_name: str = ""
    """Name under which clients ask for the model; empty: the folder's name."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all."""

    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port of the OpenAI API, /healthz, /readyz and /metrics; 0 takes a free one."""

    engine: Literal["torch", "sglang"] = "torch"
    """What runs the model: torch (Updraft's own) or sglang (a stock SGLang server)."""

    attach: str = ""
    """URL of an SGLang server that runs already, on this machine or in this pod; empty: start one with sglang_python."""

    sglang_python: Path | None = None
    """Python interpreter of an environment with SGLang: the server is started and ended with this process."""

    sglang_args: str = ""
    """More arguments of the server that is started, as in a shell; they win over ours."""

    sglang_admin_key: SecretStr = SecretStr("")
    """The server's --admin-api-key: shown to a server that runs, and given to one that is started."""

    sglang_admin_key_file: Path | None = None
    """File with that key, as `updraft-inference prepare-sglang --admin-key-file` writes it; sglang_admin_key wins."""

    sglang_socket: Path | None = None
    """Unix socket on which Updraft's plugin inside SGLang is listened to; default: sglang.sock in data_dir."""

    sglang_restarts: bool = False
    """Whether a server that was started here is started anew, after its requests have ended, for a draft with another
    vocabulary: SGLang reads that only at its start. Such a draft is refused otherwise."""

    draft_vocab_size: Annotated[int, Field(ge=16)] = 8192
    """Tokens that the first draft of an SGLang server can propose; equal to UPDRAFT_TRAINER_DRAFT_VOCAB_SIZE."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the target. float32 makes greedy output bit-equal with any draft."""

    device: str = "cpu"
    """Where torch runs: cpu, cuda, cuda:0."""

    kernels: Literal["auto", "off"] = "auto"
    """Whether the torch engine uses its C++ kernels on a CPU. auto: the fastest that the package has for this CPU; off: torch's
    operations, which are slower."""

    num_threads: Annotated[int, Field(ge=0)] = 0
    """Threads of torch; 0: its own choice."""

    num_slots: Count = 8
    """Requests that run at once; each holds a KV cache of max_context tokens."""

    max_context: Count = 2048
    """Most tokens of a request, prompt and output together; unless it is set, no more than the model knows."""

    max_queued_requests: Annotated[int, Field(ge=0)] = 256
    """Requests that may wait for a slot; beyond it clients get 429."""

    api_keys_file: Path | None = None
    """File with the API keys that clients show, one a line; read again when it changes. Without it everybody may ask."""

    max_requests_per_key: Annotated[int, Field(ge=0)] = 0
    """Requests of one API key that are answered at once, each choice of `n` being one; beyond it that client gets 429.
    0: no limit."""

    max_body_bytes: Bytes = 1024 * 1024
    """Largest request body."""

    max_connections: Count = 512
    """Requests read or answered at once: beyond it clients get 429. Idle connections beyond it are closed; probes are
    answered still. Keep it above num_slots + max_queued_requests, and below the limit of open files."""

    stall_seconds: Annotated[float, Field(gt=0)] = 30.0
    """How long a client may take to send its request, or leave its answer unread; then it is cut off and its request
    cancelled."""

    drain_seconds: Annotated[float, Field(ge=0)] = 30.0
    """How long running requests may go on after SIGTERM. Keep it below the pod's termination grace period."""

    drafter: Literal["auto", "none", "ngram", "eagle3", "hybrid"] = "auto"
    """Who drafts unless a request says so. auto: eagle3 once a draft is loaded; hybrid: lookup or that, as promises more."""

    lookahead: Annotated[int, Field(ge=0, le=16)] = 3
    """Largest number of drafts a verify step; the engine chooses up to it."""

    remembered_tokens: Annotated[int, Field(ge=0, le=2**20)] = 65536
    """Tokens of earlier answers that lookups remember for each of the last sixteen API keys that asked, or for all together
    where there are no keys; 80 bytes each. 0: lookups go by a request's own text alone."""

    draft_path: Path | None = None
    """A fixed draft (checkpoint folder) instead of the registry's."""

    registry_address: str = ""
    """host:port of the registry; empty: no registry, the draft never changes."""

    registry_token_file: Path | None = None
    """File with the token that the registry knows this pod by, of role serve; read again when it changes."""

    registry_ca_file: Path | None = None
    """Authority of the registry's certificate, in PEM format: speak TLS, and only to whom it vouches for."""

    registry_cert_file: Path | None = None
    """Certificate of this process, for a registry that asks for one (mTLS); read at the start."""

    registry_key_file: Path | None = None
    """Its key."""

    speculator: settings.Name = "default"
    """Which line of drafts this pod serves."""

    namespace: settings.Name = "default"
    """Part of the stream's key, so that installations can share a Redis."""

    pod_name: PodName = Field(default_factory=lambda: socket.gethostname()[:63].strip("._-") or "pod")
    """Unique among the pods of a speculator; default: the host's name."""

    report_seconds: Annotated[float, Field(gt=0)] = 2.0
    """How often the pod reports to the registry; changes are reported at once."""

    redis_url: SecretStr = SecretStr("")
    """redis://host:port/db or unix:///path of the trace stream; empty: nothing is captured."""

    capture_payload_fraction: Fraction = 1.0
    """Fraction of requests whose trace carries hidden states to learn from; the registry may overrule it."""

    capture_evaluation_fraction: Fraction = 0.1
    """Fraction of requests held out for evaluation, always with hidden states."""

    capture_prompt_rows: Annotated[int, Field(ge=0)] = 64
    """Positions at the end of the prompt whose hidden states are captured too."""

    capture_counterfactual_rows: Annotated[int, Field(ge=0, le=16)] = 0
    """Most rows a verify step whose hidden states are captured after a draft's token was rejected; the trainer learns from
    them only with a discard weight. 0: none."""

    capture_encoding: Literal["fp8", "bf16"] = "fp8"
    """How hidden states are stored; fp8 takes half the bytes and is exact to about 6 %."""

    capture_queue_entries: Count = 64
    """Traces that may wait for Redis; beyond it they are dropped and counted."""

    capture_queue_bytes: Bytes = 64 * 1024 * 1024
    """Memory of the traces that wait."""

    capture_max_bytes: Bytes = 256 * 1024 * 1024
    """Size of the stream in Redis; the oldest traces go first."""

    data_dir: Path = Field(default_factory=lambda: Path.home() / ".local/share/updraft/inference")
    """Folder for drafts and the note of the last one; default: ~/.local/share/updraft/inference."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least severe log record that is written."""

    log_format: Literal["json", "text"] = "json"
    """json for machines, text for a person."""

    @property
    def registry_credentials(self) -> Credentials:
        """What to show the registry."""
        return Credentials(
            token_file=self.registry_token_file,
            ca_file=self.registry_ca_file,
            cert_file=self.registry_cert_file,
            key_file=self.registry_key_file,
        )

    @property
    def model_name(self) -> str:
        """The name that clients use."""
        return self.served_model_name or self.model.resolve().name

    @property
    def stream_key(self) -> str:
        """Where traces go."""
        return streams.key(self.namespace, self.speculator)

    @property
    def sglang_socket_path(self) -> Path:
        """Where SGLang's plugin connects to."""
        return self.sglang_socket or self.data_dir / "sglang.sock"

    @model_validator(mode="after")
    def _a_server_to_serve_with(self) -> Self:
        if self.engine == "torch" and self.attach:
            raise ValueError("ATTACH is for ENGINE sglang")
        if self.engine == "sglang" and not self.attach and self.sglang_python is None:
            raise ValueError("ENGINE sglang needs ATTACH, the URL of a server, or SGLANG_PYTHON, to start one with")
        if self.engine == "sglang" and self.drafter not in ("auto", "eagle3"):
            raise ValueError(f"DRAFTER {self.drafter} is for ENGINE torch: SGLang drafts with eagle3 for all requests")
        return self

    @model_validator(mode="after")
    def _keys_to_count_by(self) -> Self:
        if self.max_requests_per_key and self.api_keys_file is None:
            raise ValueError("MAX_REQUESTS_PER_KEY needs API_KEYS_FILE: without keys all clients look alike")
        return self

    @model_validator(mode="after")
    def _one_source_of_drafts(self) -> Self:
        if self.draft_path is not None and self.registry_address:
            raise ValueError("DRAFT_PATH and REGISTRY_ADDRESS exclude each other: a fixed draft is never swapped")
        return self
