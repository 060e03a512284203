"""Hugging Face transformers with continuous batching on the CPU, driven over `channel`.

python transformers_driver.py --model HF_DIR --dtype float32 [--threads 2] [--num-blocks 256]
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


class Transformers:
    """A continuous-batching manager of its own for each run, so no prompt is remembered."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.settings: dict[str, Any] = vars(arguments)
        self._num_blocks = arguments.num_blocks
        self._max_batch_tokens = arguments.max_batch_tokens
        self._manager: Any = None
        os.environ["HF_HUB_OFFLINE"] = "1"
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(arguments.threads)
        self._model = AutoModelForCausalLM.from_pretrained(
            arguments.model,
            dtype=getattr(torch, arguments.dtype),
            attn_implementation=arguments.attention,
        ).eval()

    def prepare(self, requests: list[Request]) -> None:
        """Start a manager; only it, and not the model, takes a length per request."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        self._manager = self._model.init_continuous_batching(
            generation_config=GenerationConfig(
                max_new_tokens=max(request.num_tokens for request in requests),
                do_sample=False,
                eos_token_id=-1,  # ends nothing
                pad_token_id=self._model.config.pad_token_id,
            ),
            # Unbounded, its cache takes most of the memory that is free.
            continuous_batching_config=ContinuousBatchingConfig(
                num_blocks=self._num_blocks, max_batch_tokens=self._max_batch_tokens
            ),
        )
        self._manager.start()

    def run(self, requests: list[Request]) -> list[list[int]]:
        """Generate."""
        try:
            outputs = self._generate(requests)
        finally:
            self._manager.stop(block=True)
        return [outputs[request.custom_id] for request in requests]

    def _generate(self, requests: list[Request]) -> dict[str, list[int]]:
        outputs: dict[str, list[int]] = {}
        for request in requests:
            self._manager.add_request(
                request.prompt, request_id=request.custom_id, max_new_tokens=request.num_tokens
            )
        while len(outputs) < len(requests):
            # Asked before: the last that it says may be why it stops.
            was_running = self._manager.is_running()
            result = self._manager.get_result(timeout=1)
            if result is None and not was_running:
                raise RuntimeError(f"it stopped after {len(outputs)} of {len(requests)}")
            if result is not None and result.error:
                raise RuntimeError(result.error)
            if result is not None and result.is_finished():
                outputs[result.request_id] = list(result.generated_tokens)
        return outputs


def main() -> None:
    """Serve."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--attention", default="paged|sdpa")
    parser.add_argument("--num-blocks", type=int, default=256)
    parser.add_argument("--max-batch-tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    channel = Channel()
    try:
        channel.serve(Transformers(parser.parse_args()), versions("transformers", "torch"))
    except Exception as error:
        fail(channel, error)
        raise


if __name__ == "__main__":
    main()
