"""A worker group like any other, but for its stub engine, whose every step takes a while.

    python -m support.slow_group STEP_S [flag ...]

Without that, it would be done with a request before anything could happen to it.
"""

from __future__ import annotations

import sys
from functools import partial
from unittest.mock import patch

from gpu_worker import service
from gpu_worker.__main__ import command
from gpu_worker.rank_options import RankOptions
from service.command import run_command


def main() -> int:
    step_s, arguments = float(sys.argv[1]), sys.argv[2:]
    with patch.object(service, "RankOptions", partial(RankOptions, stub_step_s=step_s)):
        return run_command(command, ["--model", "stub:", *arguments])


if __name__ == "__main__":
    sys.exit(main())
