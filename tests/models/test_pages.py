"""Pages give back what was stored, and cost memory only once they are written."""

from __future__ import annotations

import psutil
import pytest
import torch

from cache.page_formats import FLOAT16, FLOAT32, FP8, INT8, PAGE_FORMATS, PageFormat
from cache.pages import KVPages, PageShape

CPU = torch.device("cpu")
ERRORS = {"float32": 0.0, "fp16": 2**-11, "bf16": 2**-8, "fp8": 2**-4 * 1.01, "int8": 0.5 / 126}
"""The greatest, relative to a row's greatest magnitude."""
SHAPE = PageShape(num_layers=2, num_kv_heads=3, head_dim=4, block_size=4, format=FLOAT32)


def test_a_block_reads_back_what_was_stored_in_its_slots() -> None:
    pages = KVPages(SHAPE, 5, CPU)
    keys, values = torch.randn(6, 3, 4), torch.randn(6, 3, 4)
    slots = torch.tensor([9, 8, 11, 10, 16, 17], dtype=torch.int32)  # blocks 2 and 4
    pages.layer(1).store(pages.slot_rows(slots), keys, values)

    read_keys, read_values = pages.layer(1).read(
        pages.block_rows(torch.tensor([4, 2])), torch.float32
    )

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
    keys, values = pages.layer(1).read(pages.block_rows(torch.tensor([0, 1])), torch.float32)
    assert not keys.any()
    assert not values.any()


def test_wiped_blocks_hold_zeros_in_all_layers_and_others_what_they_held() -> None:
    pages = KVPages(SHAPE, 4, CPU)
    pages.data.fill_(1)
    with torch.inference_mode():
        pages.wipe(torch.tensor([2, 0]))
    assert not pages.data[[0, 2]].any()
    assert pages.data[[1, 3]].all()


def test_bytes_per_block_is_what_a_block_takes() -> None:
    pages = KVPages(SHAPE, 7, CPU)
    assert pages.data.nbytes == 7 * SHAPE.bytes_per_block


def test_reserving_pages_does_not_commit_memory() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    shape = PageShape(num_layers=16, num_kv_heads=8, head_dim=64, block_size=16, format=FLOAT32)
    pages = KVPages(shape, 256, CPU)
    assert pages.data.nbytes == 256 * 2**20
    assert process.memory_info().rss - before < 32 * 2**20


@pytest.mark.parametrize("form", PAGE_FORMATS.values(), ids=PAGE_FORMATS)
def test_each_format_gives_back_what_it_can_hold(form: PageFormat) -> None:
    shape = PageShape(num_layers=3, num_kv_heads=2, head_dim=64, block_size=16, format=form)
    pages = KVPages(shape, 5, CPU)
    keys, values = torch.randn(2, 30, 2, 64) * torch.logspace(-3, 3, 30)[:, None, None]
    slots = torch.randperm(5 * 16)[:30].int()
    pages.layer(2).store(pages.slot_rows(slots), keys, values)
    read = pages.layer(2).read(pages.block_rows(torch.arange(5)), torch.float32)
    for found, wanted in zip(read, (keys, values), strict=True):
        kept = found[:, slots.long()].transpose(0, 1)
        error = (kept - wanted).abs().amax(dim=-1) / wanted.abs().amax(dim=-1)
        assert error.max() <= ERRORS[form.name]
    assert not pages.layer(1).read(pages.block_rows(torch.arange(5)), torch.float32)[1].any()


@pytest.mark.parametrize("form", PAGE_FORMATS.values(), ids=PAGE_FORMATS)
def test_a_row_with_a_number_that_is_none_does_not_read_as_numbers(form: PageFormat) -> None:
    pages = KVPages(PageShape(1, 2, 8, 4, form), 1, CPU)
    rows = torch.randn(2, 2, 8)
    rows[0, 1, 3], rows[1, 0, 2] = torch.nan, -torch.inf
    pages.layer(0).store(pages.slot_rows(torch.tensor([1, 2])), rows, rows)
    keys, _ = pages.layer(0).read(pages.block_rows(torch.tensor([0])), torch.float32)
    is_finite = keys.isfinite().all(dim=-1)
    assert is_finite.tolist() == [[True, True, False, True], [True, False, True, True]]


@pytest.mark.parametrize("form", PAGE_FORMATS.values(), ids=PAGE_FORMATS)
def test_a_head_has_the_same_bits_whatever_heads_lie_beside_it(form: PageFormat) -> None:
    rows = torch.randn(16, 3, 64)
    slots = torch.arange(16)
    wide = KVPages(PageShape(1, 3, 64, 16, form), 1, CPU)
    wide.layer(0).store(wide.slot_rows(slots), rows, rows)
    for head in range(3):
        narrow = KVPages(PageShape(1, 1, 64, 16, form), 1, CPU)
        narrow.layer(0).store(narrow.slot_rows(slots), rows[:, head : head + 1], rows[:, :1])
        plane = slice(head * 16 * 64, (head + 1) * 16 * 64)
        ours, theirs = wide.layer(0).keys[plane], narrow.layer(0).keys[: 16 * 64]
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
        if form.has_scales:
            scales, narrow_scales = wide.layer(0).key_scales, narrow.layer(0).key_scales
            assert scales is not None
            assert narrow_scales is not None
            assert torch.equal(scales[16 * head : 16 * (head + 1)], narrow_scales[:16])


@pytest.mark.parametrize(("head_dim", "most"), [(64, 0.531), (128, 0.516)])
@pytest.mark.parametrize("form", [FP8, INT8], ids=lambda form: form.name)
def test_8_bit_formats_take_half_of_16_bits(form: PageFormat, head_dim: int, most: float) -> None:
    narrow = PageShape(30, 3, head_dim, 16, form).bytes_per_block
    assert narrow <= most * PageShape(30, 3, head_dim, 16, FLOAT16).bytes_per_block
