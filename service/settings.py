"""Every setting of every process: one frozen object per service, one default per value.

A value comes from a command-line flag (a keyword here), else from the environment variable
`FOREBAY_<FIELD>`, else from the default below. Services read their settings once, at start, with
`load`; nothing is read at import.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias
from urllib.parse import urlsplit

from pydantic import (
    BeforeValidator,
    ByteSize,
    Field,
    SecretStr,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from wire.errors import ConfigError
from wire.redaction import mask_passwords

ENV_PREFIX = "FOREBAY_"

PositiveInt: TypeAlias = Annotated[int, Field(ge=1)]
PositiveSeconds: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
LogLevel: TypeAlias = Literal["debug", "info", "warning", "error"]
LogFormat: TypeAlias = Literal["auto", "console", "json"]
Name: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
"""A name that becomes a part of Redis keys: no colon, brace or space in it."""


Quantization: TypeAlias = Literal["none", "int8", "int4"]
KVCacheDtype: TypeAlias = Literal["auto", "fp8", "int8", "bf16", "fp16", "float32"]
"""How weights are narrowed as they are loaded."""

_REDIS_SCHEMES = ("redis", "rediss", "unix")
_STUB_MODEL = re.compile(r"stub:(?:(?P<step_ms>\d{1,6}(?:\.\d{1,3})?)ms)?")


class CommonSettings(BaseSettings):
    """What every process needs: where the server is, and how to log."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_ignore_empty=True, frozen=True, extra="forbid"
    )

    redis_url: SecretStr = Field(
        default=SecretStr("redis://127.0.0.1:6379/0"),
        description="Redis or Valkey server: redis://, rediss:// (TLS) or unix:///path/to/socket.",
        json_schema_extra={"flag": "--redis", "metavar": "URL"},
    )
    namespace: Name = Field(
        default="forebay",
        description="Prefix of every Redis key; pipelines with different ones share nothing.",
    )
    log_level: Annotated[LogLevel, BeforeValidator(lambda v: str(v).lower())] = Field(
        default="info", description="The least important events to log."
    )
    log_format: LogFormat = Field(
        default="auto", description="auto is console on a terminal, and JSON lines elsewhere."
    )

    @field_validator("redis_url")
    @classmethod
    def _check_redis_url(cls, url: SecretStr) -> SecretStr:
        parts = urlsplit(url.get_secret_value())
        if parts.scheme not in _REDIS_SCHEMES:
            schemes = ", ".join(f"{scheme}://" for scheme in _REDIS_SCHEMES)
            raise ValueError(f"the URL must start with one of {schemes}")
        if parts.scheme == "unix" and not parts.path.startswith("/"):
            raise ValueError("a unix URL needs the absolute path of a socket: unix:///path")
        if parts.scheme != "unix" and not parts.hostname:
            raise ValueError("the URL has no host")
        return url

    @property
    def redis_url_for_logs(self) -> str:
        """The server's address with its password masked."""
        return mask_passwords(self.redis_url.get_secret_value())

    @classmethod
    def load(cls, **flags: Any) -> Self:
        """Settings from `flags` (those that are not None), the environment and the defaults.

        Raises ConfigError, one line: which flag or variable, its value (unless secret), and why.
        """
        check_environment(os.environ)
        given = {name: value for name, value in flags.items() if value is not None}
        try:
            return cls(**given)
        except ValidationError as error:
            # `from None`: pydantic's own text repeats the input, which may be a secret.
            raise ConfigError(_one_line(cls, error, given)) from None


class QueueSettings(CommonSettings):
    """What producers bound their queue by."""

    max_queued: PositiveInt = Field(
        default=100_000,
        description="Requests queued (and results unread) at most; above it, intake is full.",
    )
    result_ttl_s: PositiveInt = Field(
        default=3600, description="How long a finished request's result can be read, in seconds."
    )


class FleetSettings(CommonSettings):
    """What the schedulers and the worker groups must agree on."""

    group_timeout_ms: Annotated[int, Field(ge=100)] = Field(
        default=3600,
        description="A group without a heartbeat for this long is dead, and its requests move on.",
    )
    max_crashes: PositiveInt = Field(
        default=3,
        description="With so many crashes of its group a request fails, if alone in the last.",
    )


class SchedulerSettings(FleetSettings):
    """The scheduler: how it batches, and when it gives up on a request."""

    max_batch_tokens: PositiveInt = Field(
        default=8192, description="Prompt tokens in one batch, at most."
    )
    max_batch_requests: Annotated[int, Field(ge=1, le=1000)] = Field(
        default=64, description="Requests in one batch, at most."
    )
    max_batch_wait_ms: Annotated[int, Field(ge=0)] = Field(
        default=5, description="How long a batch waits for company, in milliseconds."
    )
    window: PositiveInt = Field(
        default=4096, description="Requests read ahead of the groups' credits, at most."
    )
    max_errors: PositiveInt = Field(
        default=3, description="With so many attempts that ended in an error a request fails."
    )
    retry_delay_ms: PositiveInt = Field(
        default=500,
        description="How long a request waits after an error, in milliseconds; doubled each time.",
    )
    max_retry_delay_ms: PositiveInt = Field(
        default=30_000, description="The longest such wait, in milliseconds."
    )


class WorkerSettings(FleetSettings):
    """A worker group: its model, its ranks, and the limits of its engine."""

    model: str = Field(
        min_length=1,
        description="A safetensors directory, a GGUF file, or stub: for an engine without a model "
        "(stub:5ms is one whose steps take 5 ms).",
    )
    served_model_name: str | None = Field(
        default=None,
        min_length=1,
        description="The name that requests call the model by; its file's name if not given.",
    )
    tensor_parallel_size: PositiveInt = Field(
        default=1, description="Ranks that the model is sharded over."
    )
    group_id: Name | None = Field(
        default=None, description="This group's name in the fleet; generated if not given."
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        default="auto",
        description="What weights are held in; auto is what this machine is fastest with.",
    )
    quantization: Quantization = Field(
        default="none",
        description="Weights in fewer bits, quantized as they are loaded. int8 is faster and "
        "nearly as good; int4 is for files that are of 4 bits already, and keeps them small.",
    )
    cpu_isa: Literal["auto", "amx", "avx512", "torch"] = Field(
        default="auto",
        description="What the CPU kernels may use of the processor, at most; torch is to do "
        "without them.",
    )
    max_num_seqs: PositiveInt = Field(
        default=128, description="Sequences that the engine runs at a time, at most."
    )
    max_num_batched_tokens: PositiveInt | None = Field(
        default=None,
        description="Tokens in one engine step, at most; 1024 on the CPU and 8192 on a GPU if not "
        "given.",
    )
    max_model_len: PositiveInt | None = Field(
        default=None,
        description="Prompt and output together, in tokens; the model's if not given.",
    )
    block_size: Annotated[int, Field(ge=1, le=256)] = Field(
        default=16, description="Tokens in one block of the KV-cache."
    )
    kv_cache_dtype: KVCacheDtype = Field(
        default="auto",
        description="What the KV-cache holds keys and values in. fp8 and int8 take half of the "
        "memory of 16 bits, with a scale per token and head; auto is 16 bits, or float32 beside "
        "float32 weights.",
    )
    kv_cache_bytes: Annotated[ByteSize, Field(ge=1)] | None = Field(
        default=None,
        description="Memory of the KV-cache per rank, such as 512MiB; chosen by the engine if not "
        "given.",
        json_schema_extra={"metavar": "SIZE"},
    )
    host_cache_bytes: Annotated[ByteSize, Field(ge=0)] | None = Field(
        default=None,
        description="Host memory per rank for blocks that the KV-cache has no room for; if not "
        "given, up to 4 GiB for a GPU, and none on the CPU, where the KV-cache makes more of it.",
        json_schema_extra={"metavar": "SIZE"},
    )
    heartbeat_ms: Annotated[int, Field(ge=10)] = Field(
        default=2000,
        validate_default=True,
        description="Time between two heartbeats, in milliseconds; one that fails is tried again "
        "at once.",
    )
    flush_ms: Annotated[int, Field(ge=1)] = Field(
        default=20, description="Time between two writes of new tokens to Redis, in milliseconds."
    )
    threads: PositiveInt | None = Field(
        default=None,
        description="CPU threads per rank; the cores shared among the ranks if not given.",
    )
    drain_timeout_s: PositiveSeconds = Field(
        default=30.0, description="How long running requests may take to finish after SIGTERM."
    )
    load_timeout_s: PositiveSeconds = Field(
        default=600.0, description="How long the ranks may take to load the model."
    )
    step_timeout_s: PositiveSeconds = Field(
        default=10.0,
        description="An engine step in which not even a layer is done for this long has hung, and "
        "the ranks are started again.",
    )

    @field_validator("heartbeat_ms")
    @classmethod
    def _check_heartbeat(cls, heartbeat_ms: int, info: ValidationInfo) -> int:
        timeout_ms = info.data.get("group_timeout_ms")
        if timeout_ms is not None and 3 * heartbeat_ms > 2 * timeout_ms:
            raise ValueError(
                f"a group that is dead after {timeout_ms} ms must beat every {2 * timeout_ms // 3} "
                "or more often: there must be time to try again a beat that failed"
            )
        return heartbeat_ms

    @field_validator("model")
    @classmethod
    def _check_stub(cls, model: str) -> str:
        if model.startswith("stub:") and not _STUB_MODEL.fullmatch(model):
            raise ValueError(
                "the stub engine is stub:, or with the time that each of its steps takes stub:5ms"
            )
        return model

    @property
    def model_path(self) -> Path | None:
        """The model's file or directory, None for the stub engine."""
        return None if self.model.startswith("stub:") else Path(self.model).expanduser()

    @property
    def stub_step_s(self) -> float:
        """How long a step of the stub engine takes."""
        stub = _STUB_MODEL.fullmatch(self.model)
        return float(stub["step_ms"] or 0) / 1000 if stub else 0.0


class LocalSettings(QueueSettings):
    """The whole pipeline on one machine: where `forebay up` lives, and how long things may take."""

    state_dir: Path | None = Field(
        default=None,
        description="Where `forebay up` keeps its server and logs; ~/.local/state/forebay (or "
        "$XDG_STATE_HOME/forebay) if not given.",
    )
    broker: Path | None = Field(
        default=None,
        description="The server to embed; redis-server or valkey-server on the PATH, else the one "
        "that comes with Forebay, if not given.",
        json_schema_extra={"metavar": "FILE"},
    )
    groups: PositiveInt = Field(default=1, description="Worker groups to start.")
    start_timeout_s: PositiveSeconds = Field(
        default=60.0, description="How long the embedded server may take to answer."
    )
    stop_timeout_s: PositiveSeconds = Field(
        default=40.0, description="How long a child may take to stop before it is killed."
    )

    @property
    def resolved_state_dir(self) -> Path:
        """`state_dir`, or the place that the XDG base directory specification gives it."""
        if self.state_dir is not None:
            return self.state_dir.expanduser().absolute()
        base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
        return Path(base).expanduser().absolute() / "forebay"


ALL_SETTINGS: tuple[type[CommonSettings], ...] = (
    CommonSettings,
    QueueSettings,
    FleetSettings,
    SchedulerSettings,
    WorkerSettings,
    LocalSettings,
)


def variable(field: str) -> str:
    """The environment variable of a settings field."""
    return ENV_PREFIX + field.upper()


def flag(cls: type[CommonSettings], field: str) -> str:
    """The command-line flag of a settings field."""
    extra = cls.model_fields[field].json_schema_extra
    if isinstance(extra, dict) and "flag" in extra:
        return str(extra["flag"])
    return "--" + field.replace("_", "-")


def known_variables() -> frozenset[str]:
    """The environment variables of all services: they may share one environment."""
    return frozenset(variable(field) for cls in ALL_SETTINGS for field in cls.model_fields)


def check_environment(environ: Mapping[str, str]) -> None:
    """Raise ConfigError for the first `FOREBAY_*` variable that no service knows."""
    known = known_variables()
    for name in sorted(environ):
        if name.upper().startswith(ENV_PREFIX) and name.upper() not in known:
            close = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.8)
            hint = f"did you mean {close[0]}?" if close else "unset it"
            raise ConfigError(f"{name} is not a setting of Forebay; {hint}")


def _one_line(
    cls: type[CommonSettings], error: ValidationError, given: Mapping[str, object]
) -> str:
    """The first problem of `error`, in the words that the user used to set it."""
    problem = error.errors(include_url=False, include_context=False)[0]
    field = str(problem["loc"][0]) if problem["loc"] else ""
    if field not in cls.model_fields:
        return f"{field} is not a setting of {cls.__name__}"
    name = flag(cls, field) if field in given else variable(field)
    if problem["type"] == "missing":
        return f"{flag(cls, field)} is missing: give it, or set {variable(field)}"
    reason = problem["msg"].removeprefix("Value error, ")
    reason = reason[:1].lower() + reason[1:]
    if cls.model_fields[field].annotation is SecretStr:
        return f"{name} cannot be used: {reason}"
    return f"{name} is {problem['input']!r}: {reason}"
