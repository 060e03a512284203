"""One tensor-parallel rank as a process: loads its part, waits for a line, decodes greedily.

    python -m support.greedy_rank '{"rank": 0, "size": 2, "model": ..., "rendezvous": ...,
                                    "prompts": [[1, 2]], "num_new_tokens": 4, "num_blocks": 9}'

It writes a line {"num_sharded_bytes": n} when it is loaded, and rank 0 the answers at the end.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import structlog
import torch

from gpu_worker.model_runner import ModelRunner
from gpu_worker.tensor_parallel import TensorParallelGroup
from support.greedy_driver import greedy_as_rank


def main() -> None:
    options = json.loads(sys.argv[1])
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    torch.set_num_threads(1)
    group = TensorParallelGroup.connect(
        options["rank"],
        options["size"],
        Path(options["rendezvous"]),
        torch.device("cpu"),
        timeout_s=60,
    )
    runner = ModelRunner(Path(options["model"]), group=group, num_blocks=options["num_blocks"])
    print(json.dumps({"num_sharded_bytes": runner.num_sharded_bytes}), flush=True)
    sys.stdin.readline()
    answers = greedy_as_rank(
        runner, group, options["prompts"], num_new_tokens=options["num_new_tokens"]
    )
    group.close()
    if answers is not None:
        print(json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
