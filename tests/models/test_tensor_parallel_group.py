"""A group of rank processes notices at once when one of them dies, also while it is idle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gpu_worker.tensor_parallel import TensorParallelGroup
from support.rank_processes import loaded_ranks
from support.tiny_models import make_tiny_model


@pytest.mark.parametrize("victim", [0, 1])
def test_the_other_rank_ends_when_one_is_killed(tmp_path: Path, victim: int) -> None:
    make_tiny_model("qwen2", tmp_path / "model")
    with loaded_ranks(
        2, tmp_path / "model", tmp_path, [[1, 2, 3]], num_new_tokens=4, num_blocks=8
    ) as ranks:
        survivor = ranks.processes[1 - victim]
        ranks.processes[victim].kill()
        assert survivor.stdin is not None
        survivor.stdin.write("\n")
        survivor.stdin.flush()
        # Far below the 60 s that a collective may take: the closed socket is what ends it.
        assert survivor.wait(timeout=20) != 0


def test_a_group_of_one_needs_nobody() -> None:
    group = TensorParallelGroup.single()
    values = torch.ones(2, 3)
    assert group.all_reduce(values) is values
    assert group.gather_columns(values, (3,)) is values
    assert group.minimum(7) == 7
    group.send_plan(None)
    group.close()
