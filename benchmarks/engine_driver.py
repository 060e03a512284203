"""The bare engine in one process, without a broker or anything else around it.

    python -m benchmarks.engine_driver --model model.gguf [--dtype float16 ...]

Speaks `benchmarks/peers/channel.py`. Flags are those of a worker. Every run has a cache salt of
its own, so that it finds nothing of an earlier one in the prefix cache. With a tensor-parallel
size above 1 the other ranks are processes of their own, as in a worker group.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.flags import worker_settings
from benchmarks.peers.channel import Channel, Request, fail, versions
from gpu_worker.engine.sharded import ShardedEngine
from gpu_worker.layer_progress import LayerCounter
from gpu_worker.rank_options import rank_command
from gpu_worker.service import rank_options
from service import logs
from wire.ids import RequestId, token_ids
from wire.messages import Assignment
from wire.sampling import SamplingParams

_STOP_TIMEOUT_S = 10.0


class BareEngine:
    """`Engine.add` for all requests, then `Engine.step` until there is no work."""

    def __init__(self, engine: ShardedEngine, settings: dict[str, Any]) -> None:
        self.settings = settings
        self._engine = engine
        self._num_runs = 0

    def prepare(self, requests: list[Request]) -> None:
        """Change the salt."""
        self._num_runs += 1

    def run(self, requests: list[Request]) -> list[list[int]]:
        """Generate."""
        outputs: dict[RequestId, list[int]] = {}
        numbered: dict[int, list[int]] = {}
        for request in requests:
            request_id = RequestId(request.custom_id)
            outputs[request_id] = []
            self._engine.add(self._assignment(request_id, request))
        while self._engine.has_work:
            step = self._engine.step()
            for output in step.outputs:
                if output.error is not None:
                    raise RuntimeError(f"{output.request_id}: {output.error.message}")
                outputs[output.request_id] += output.token_ids
                if output.index is not None:
                    numbered[output.index] = outputs[output.request_id]
            for index, token_id in zip(step.indices, step.token_ids, strict=True):
                numbered[index].append(token_id)
        return [outputs[RequestId(request.custom_id)] for request in requests]

    def _assignment(self, request_id: RequestId, request: Request) -> Assignment:
        return Assignment(
            request_id=request_id,
            fence=1,
            prompt_token_ids=token_ids(request.prompt),
            sampling=SamplingParams(
                max_tokens=request.num_tokens,
                min_tokens=request.num_tokens,
                ignore_eos=True,
                temperature=0.0,
            ),
            stream=False,
            cache_salt=self._num_runs.to_bytes(16, "big"),
        )


def _end(rank: subprocess.Popen[bytes]) -> None:
    """Rank 0 has released it; should that have failed, it would wait for ever."""
    try:
        rank.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        rank.kill()
        rank.wait()


def main() -> None:
    """Serve."""
    channel = Channel()
    try:
        settings, given = worker_settings(sys.argv[1:])
        logs.configure(level="warning", log_format="json", service="engine")
        options, size = rank_options(settings), settings.tensor_parallel_size
        with ExitStack() as stack:
            directory = stack.enter_context(tempfile.TemporaryDirectory())
            rendezvous = str(Path(directory) / "rendezvous")
            for rank in range(1, size):
                command = rank_command(
                    options, rank=rank, size=size, rendezvous=rendezvous, socket_fd=None
                )
                stack.callback(_end, subprocess.Popen(command))
            engine = stack.enter_context(
                ShardedEngine(size, Path(rendezvous), options, LayerCounter())
            )
            channel.serve(BareEngine(engine, given), versions("torch"))
    except Exception as error:
        fail(channel, error)
        raise
    sys.stderr.flush()
    os._exit(0)  # as a rank does: threads of a collective must not hold the process back


if __name__ == "__main__":
    main()
