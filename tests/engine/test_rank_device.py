"""Which device a rank computes on."""

from __future__ import annotations

import pytest
import torch

from gpu_worker.engine import sharded
from wire.errors import ConfigError


def test_each_rank_has_a_gpu_of_its_own_where_there_are_gpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(sharded._device(rank)) for rank in range(2)] == ["cuda:0", "cuda:1"]
    with pytest.raises(ConfigError, match="rank 2 finds no GPU of its own, this machine has 2"):
        sharded._device(2)


def test_without_a_gpu_every_rank_computes_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert {str(sharded._device(rank)) for rank in range(3)} == {"cpu"}
