"""OpenVINO GenAI's continuous batching on the CPU, driven over `channel`.

    python openvino_driver.py --model IR_DIR --dtype f32 [--threads 2] [--prefix-first]

`--model` is a directory that optimum-intel has exported (int8 or fp16 weights); `--dtype` is the
precision that the plugin computes in. With `--prefix-first` the driver helps: one request of each
distinct beginning runs before the others, since requests that are added together do not share
theirs.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from channel import (  # type: ignore[import-not-found, unused-ignore]
    Channel,
    Request,
    fail,
    versions,
)

_BEGINNING = 256


class OpenVino:
    """A pipeline that is built anew before each run, which empties its prefix cache."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.settings: dict[str, Any] = vars(arguments)
        self._model = arguments.model
        self._prefix_first = arguments.prefix_first
        self._properties = {
            "INFERENCE_NUM_THREADS": arguments.threads,
            "INFERENCE_PRECISION_HINT": arguments.dtype,
        }
        import openvino_genai  # type: ignore[import-not-found, unused-ignore]

        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = arguments.kv_cache_gib
        scheduler.max_num_seqs = arguments.max_num_seqs
        scheduler.max_num_batched_tokens = arguments.max_num_batched_tokens
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = True
        self._scheduler = scheduler
        self._genai = openvino_genai
        self._pipeline: Any = None
        self._build()

    def prepare(self, requests: list[Request]) -> None:
        """Build a new pipeline, and run it on something before it is timed."""
        self._build()
        self._submit([Request("first", list(range(100, 200)), 8)])

    def run(self, requests: list[Request]) -> list[list[int]]:
        """Generate."""
        if not self._prefix_first:
            return self._submit(requests)
        seen: set[tuple[int, ...]] = set()
        first: list[Request] = []
        rest: list[Request] = []
        for request in requests:
            beginning = tuple(request.prompt[:_BEGINNING])
            (rest if beginning in seen else first).append(request)
            seen.add(beginning)
        outputs: dict[str, list[int]] = {}
        for part in filter(None, (first, rest)):
            ids = (request.custom_id for request in part)
            outputs |= dict(zip(ids, self._submit(part), strict=True))
        return [outputs[request.custom_id] for request in requests]

    def _build(self) -> None:
        self._pipeline = None  # the old one's memory first
        self._pipeline = self._genai.ContinuousBatchingPipeline(
            self._model, self._scheduler, "CPU", self._properties
        )

    def _submit(self, requests: list[Request]) -> list[list[int]]:
        import numpy as np
        import openvino  # type: ignore[import-not-found, unused-ignore]

        configs = []
        for request in requests:
            config = self._genai.GenerationConfig()
            config.max_new_tokens = config.min_new_tokens = request.num_tokens
            config.ignore_eos = True
            config.do_sample = False
            configs.append(config)
        prompts = [openvino.Tensor(np.array([r.prompt], dtype=np.int64)) for r in requests]
        results = self._pipeline.generate(prompts, configs)
        return [list(result.m_generation_ids[0]) for result in results]


def main() -> None:
    """Serve."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="f32")
    parser.add_argument("--prefix-first", action="store_true")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--max-num-seqs", type=int, default=128)
    parser.add_argument("--max-num-batched-tokens", type=int, default=512)
    parser.add_argument("--kv-cache-gib", type=int, default=4)
    channel = Channel()
    try:
        engine = OpenVino(parser.parse_args())
        channel.serve(engine, versions("openvino", "openvino-genai"))
    except Exception as error:
        fail(channel, error)
        raise


if __name__ == "__main__":
    main()
