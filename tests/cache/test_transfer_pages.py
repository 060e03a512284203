"""Pieces are what the pages of the KV-cache hold: a rank that fetches has what it would compute."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cache.page_formats import BFLOAT16, FP8, INT8, SCALE_DTYPE, PageFormat
from cache.pages import KVPages, PageShape
from cache.transfer.slots import BlockLayout, HostSlots
from support.transfer_groups import SHARDS

NUM_LAYERS, NUM_HEADS, HEAD_DIM, BLOCK_SIZE, NUM_BLOCKS = 2, 3, 64, 16, 3


def stored_pages(form: PageFormat, heads: range) -> KVPages:
    """A rank's pages, after it has stored these heads of the same keys and values as all do."""
    shape = PageShape(NUM_LAYERS, len(heads), HEAD_DIM, BLOCK_SIZE, form)
    pages = KVPages(shape, NUM_BLOCKS, torch.device("cpu"))
    num_tokens = NUM_BLOCKS * BLOCK_SIZE
    rows = pages.slot_rows(torch.arange(num_tokens))
    values = torch.randn(
        (NUM_LAYERS, 2, num_tokens, NUM_HEADS, HEAD_DIM), generator=torch.Generator().manual_seed(0)
    )[:, :, :, heads.start : heads.stop]
    for layer, (keys, new_values) in enumerate(values):
        pages.layer(layer).store(rows, keys, new_values)
    return pages


def slots_of(pages: KVPages, heads: range) -> HostSlots:
    form = pages.shape.format
    layout = BlockLayout(
        num_sides=2 * NUM_LAYERS,
        element_bytes=pages.shape.plane_bytes,
        scale_bytes=BLOCK_SIZE * SCALE_DTYPE.itemsize if form.has_scales else 0,
    )
    return HostSlots(pages.data.numpy(), layout, heads)


@pytest.mark.parametrize("form", [BFLOAT16, FP8, INT8], ids=lambda form: form.name)
@pytest.mark.parametrize(("exporter", "importer"), [(1, 2), (2, 1), (2, 3), (3, 1)])
def test_pieces_are_the_same_at_every_tensor_parallel_size(
    form: PageFormat, exporter: int, importer: int
) -> None:
    sources = [slots_of(stored_pages(form, heads), heads) for heads in SHARDS[exporter]]
    blocks = np.arange(NUM_BLOCKS)
    for heads in SHARDS[importer]:
        computed = stored_pages(form, heads)
        fetched = KVPages(computed.shape, NUM_BLOCKS, torch.device("cpu"))
        into = slots_of(fetched, heads)
        for head in heads:
            for source in (source for source in sources if head in source.heads):
                run = b"".join(source.read(blocks, head))
                into.write(blocks, head, np.frombuffer(run, np.uint8))
        assert torch.equal(fetched.data, computed.data)
