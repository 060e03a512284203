"""Pages give back what was stored, and cost memory only once they are written."""

from __future__ import annotations

import psutil
import torch

from cache.pages import KVPages, PageShape

CPU = torch.device("cpu")
SHAPE = PageShape(num_layers=2, num_kv_heads=3, head_dim=4, block_size=4, dtype=torch.float32)


def test_a_block_reads_back_what_was_stored_in_its_slots() -> None:
    pages = KVPages(SHAPE, 5, CPU)
    keys, values = torch.randn(6, 3, 4), torch.randn(6, 3, 4)
    slots = torch.tensor([9, 8, 11, 10, 16, 17], dtype=torch.int32)  # blocks 2 and 4
    pages.layer(1).store(pages.slot_rows(slots), keys, values)

    read_keys, read_values = pages.layer(1).read(pages.block_rows(torch.tensor([4, 2])))

    # (head, slot, head_dim): block 4 first, its two unwritten slots zero.
    in_order = [4, 5, None, None, 1, 0, 3, 2]
    for slot, token in enumerate(in_order):
        expected_key = torch.zeros(3, 4) if token is None else keys[token]
        expected_value = torch.zeros(3, 4) if token is None else values[token]
        assert torch.equal(read_keys[:, slot], expected_key)
        assert torch.equal(read_values[:, slot], expected_value)


def test_layers_do_not_share_pages() -> None:
    pages = KVPages(SHAPE, 2, CPU)
    ones = torch.ones(1, 3, 4)
    pages.layer(0).store(pages.slot_rows(torch.tensor([3])), ones, ones)
    keys, values = pages.layer(1).read(pages.block_rows(torch.tensor([0, 1])))
    assert not keys.any()
    assert not values.any()


def test_wiped_blocks_hold_zeros_in_all_layers_and_others_what_they_held() -> None:
    pages = KVPages(SHAPE, 4, CPU)
    pages.data.fill_(torch.nan)
    with torch.inference_mode():
        pages.wipe(torch.tensor([2, 0]))
    assert not pages.data[[0, 2]].any()
    assert pages.data[[1, 3]].isnan().all()


def test_bytes_per_block_is_what_a_block_takes() -> None:
    pages = KVPages(SHAPE, 7, CPU)
    assert pages.data.nbytes == 7 * SHAPE.bytes_per_block


def test_reserving_pages_does_not_commit_memory() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    shape = PageShape(
        num_layers=16, num_kv_heads=8, head_dim=64, block_size=16, dtype=torch.float32
    )
    pages = KVPages(shape, 256, CPU)
    assert pages.data.nbytes == 256 * 2**20
    assert process.memory_info().rss - before < 32 * 2**20
