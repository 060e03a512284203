"""How a rank is started: its options, and the command line that carries them."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from wire.errors import ConfigError

if TYPE_CHECKING:
    # Not for ranks: the library behind the settings takes a tenth of a second to import.
    from service.settings import KVCacheDtype, LogFormat, LogLevel, Quantization

STUB_MODEL_PATH = "stub:"
"""In place of a model's path: run the stub engine, which needs neither a model nor torch.

Users write `stub:`, or `stub:5ms` for steps of 5 ms, which become `RankOptions.stub_step_s`.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankOptions:
    """What every rank of a group must know before it starts; given on its command line as JSON.

    What a worker's settings hold has no default here. `model_path` may be STUB_MODEL_PATH.
    `model_name` salts the prefix hashes. `dtype` is a torch dtype's name, or "auto"; `quantization`
    is of the weights, `kv_cache_dtype` of the KV-cache. `cpu_isa` bounds what CPU kernels use, and
    reaches the ranks through their environment. The KV-cache has `num_blocks` blocks, else as many
    as `kv_cache_bytes` (per rank) hold, else what the rank finds fit; blocks that it has no room
    for have `host_cache_bytes` (per rank) of host memory, or what the rank finds fit.
    `max_model_len` None takes the model's own. `max_num_batched_tokens` bounds one step's tokens
    over all sequences; None takes what suits the device. `num_threads` None shares the cores among
    the ranks. `collective_timeout_s` bounds each exchange between ranks. Every
    `progress_interval_s` rank 0 reports the progress of a long step. `stub_step_s` is how long one
    of the stub engine takes.
    """

    model_path: str
    model_name: str
    dtype: str
    quantization: Quantization
    kv_cache_dtype: KVCacheDtype
    cpu_isa: str
    block_size: int
    kv_cache_bytes: int | None
    host_cache_bytes: int | None
    max_model_len: int | None
    max_num_seqs: int
    max_num_batched_tokens: int | None
    num_threads: int | None
    collective_timeout_s: float
    progress_interval_s: float
    log_level: LogLevel
    log_format: LogFormat
    num_blocks: int | None = None
    prefix_caching: bool = True
    stub_step_s: float = 0.0

    def to_json(self) -> str:
        """The form that `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RankOptions:
        """Raise ConfigError for what is not an object with exactly this class's fields."""
        try:
            return cls(**json.loads(text))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"rank options cannot be read: {error}") from error


def rank_command(
    options: RankOptions, *, rank: int, size: int, rendezvous: str, socket_fd: int | None
) -> list[str]:
    """The command line with which this process starts one of its ranks.

    `rendezvous` is a path at which no file exists yet, in a directory that only this user can
    enter; all ranks of a group are given the same one. `socket_fd` is rank 0's end of the socket
    pair, to be inherited (`pass_fds`); None for the other ranks. On Linux a rank dies with the
    thread that started it: start it from one that lives on, such as the main thread.
    """
    # -P: a wire.py in the user's working directory must not be taken for ours.
    command = [sys.executable, "-P", "-m", "gpu_worker.rank", "--parent-pid", str(os.getpid())]
    command += ["--rank", str(rank), "--size", str(size), "--rendezvous", rendezvous]
    if socket_fd is not None:
        command += ["--socket-fd", str(socket_fd)]
    return [*command, "--options", options.to_json()]
