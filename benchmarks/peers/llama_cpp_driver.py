"""llama.cpp's server inside one process (the xllamacpp package), driven over `channel`.

    python llama_cpp_driver.py --model MODEL.gguf [--slots 32] [--threads 2] [--context 2048]

The weights are as the GGUF file holds them; `--dtype` only names the run.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from channel import (  # type: ignore[import-not-found, unused-ignore]
    Channel,
    Request,
    fail,
    versions,
)


class LlamaCpp:
    """A server that is started anew before each run, so its slots remember no prompt."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.settings: dict[str, Any] = vars(arguments)
        self._arguments = arguments
        self._server: Any = None
        self._build()

    def prepare(self, requests: list[Request]) -> None:
        """Start a new server, and run it on something before it is timed."""
        self._build()
        self._complete(Request("first", list(range(100, 200)), 8))

    def run(self, requests: list[Request]) -> list[list[int]]:
        """Generate; each request waits in a thread of its own, without HTTP."""
        with ThreadPoolExecutor(len(requests)) as threads:
            return list(threads.map(self._complete, requests))

    def _build(self) -> None:
        import xllamacpp  # type: ignore[import-not-found, unused-ignore]

        arguments = self._arguments
        params = xllamacpp.CommonParams()
        params.model.path = arguments.model
        params.n_parallel = arguments.slots
        params.n_ctx = arguments.context * arguments.slots
        params.n_batch, params.n_ubatch = 2048, 512
        params.cpuparams.n_threads = arguments.threads
        params.cpuparams_batch.n_threads = arguments.threads
        params.cont_batching = True
        params.n_gpu_layers = 0
        self._server = None  # the old one's memory first
        self._server = xllamacpp.Server(params)

    def _complete(self, request: Request) -> list[int]:
        answer = self._server.handle_completions(
            {
                "prompt": request.prompt,
                "max_tokens": request.num_tokens,
                "n_predict": request.num_tokens,
                "temperature": 0.0,
                "top_k": 1,
                "ignore_eos": True,
                # An OpenAI completion holds the token ids only in its verbose part.
                "return_tokens": True,
                "verbose": True,
            }
        )
        if answer.get("code") or "error" in answer:
            raise RuntimeError(str(answer)[:500])
        return list(answer["__verbose"]["tokens"])


def main() -> None:
    """Serve."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="gguf")
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--context", type=int, default=1280)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    channel = Channel()
    try:
        channel.serve(LlamaCpp(parser.parse_args()), versions("xllamacpp"))
    except Exception as error:
        fail(channel, error)
        raise


if __name__ == "__main__":
    main()
