"""Rotated queries, and keys and values in their pages, as the plain layers make them."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import rms_norm

from cache.key_mixing import mix, mix_queries
from cache.page_formats import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FP8,
    INT8,
    PAGE_FORMATS,
    PageFormat,
)
from cache.pages import KVPages, PageShape
from gpu_worker.kernels import library
from gpu_worker.kernels.rotary import RotateAndStore
from gpu_worker.layers.rotary import Rotation

pytestmark = pytest.mark.skipif(library.isa() is None, reason="no compiled kernels here")

NUM_QUERIES, NUM_KV = 5, 2
STEPS = {FLOAT32: 2e-6, FLOAT16: 2**-10, BFLOAT16: 2**-7, FP8: 2**-3, INT8: 0.5}
"""How far apart neighbours of a format can be, relative to them."""


@pytest.mark.parametrize("form", PAGE_FORMATS.values(), ids=PAGE_FORMATS)
@pytest.mark.parametrize(
    ("head_dim", "block_size", "num_tokens"),
    [(8, 1, 50), (64, 16, 1), (64, 16, 50), (80, 16, 50), (96, 16, 9), (128, 8, 50), (256, 16, 50)],
)
@pytest.mark.parametrize("normalize", [False, True])
def test_equals_the_plain_layers(
    form: PageFormat, head_dim: int, block_size: int, num_tokens: int, normalize: bool
) -> None:
    angles = torch.rand(num_tokens, 1, head_dim // 2) * 6
    rotation = Rotation(angles.cos(), angles.sin())
    num_blocks = 64 // block_size
    slots = torch.randperm(num_blocks * block_size)[:num_tokens].int()
    qkv = torch.randn(num_tokens, (NUM_QUERIES + 2 * NUM_KV) * head_dim)
    query_norm = torch.randn(head_dim) if normalize else None
    key_norm = torch.randn(head_dim) if normalize else None

    heads = qkv.view(num_tokens, -1, head_dim)
    query, key, value = torch.split(heads, [NUM_QUERIES, NUM_KV, NUM_KV], dim=1)
    if query_norm is not None and key_norm is not None:
        query = rms_norm(query, (head_dim,), query_norm, 1e-6)
        key = rms_norm(key, (head_dim,), key_norm, 1e-6)
    query, key = rotation.apply(query), rotation.apply(key)
    if form.mixes_keys:
        query, key = mix_queries(query), mix(key)
    shape = PageShape(3, NUM_KV, head_dim, block_size, form)
    expected, found = (KVPages(shape, num_blocks, torch.device("cpu")) for _ in range(2))
    layer = expected.layer(1)
    layer.store(expected.slot_rows(slots), key, value)

    rotate = RotateAndStore(rotation.cos, rotation.sin, slots, shape, NUM_QUERIES)
    rotate(qkv, found.layer(1), query_norm, key_norm, eps=1e-6)
    found_query = qkv.view(num_tokens, -1, head_dim)[:, :NUM_QUERIES]
    torch.testing.assert_close(found_query, query, rtol=2e-6, atol=2e-6)
    blocks = found.block_rows(torch.arange(num_blocks))
    keys, values = found.layer(1).read(blocks, torch.float32)
    expected_keys, expected_values = layer.read(blocks, torch.float32)
    # A sum that differs in its last bit may round to the next number of the format.
    torch.testing.assert_close(keys, expected_keys, rtol=STEPS[form], atol=2e-6)
    # Values are only rounded, all in the same way.
    assert torch.equal(values, expected_values)


@pytest.mark.parametrize("form", [FLOAT16, BFLOAT16], ids=lambda form: form.name)
def test_values_beyond_a_number_format_become_what_torch_makes_of_them(form: PageFormat) -> None:
    shape = PageShape(1, 1, 16, 4, form)
    pages = KVPages(shape, 1, torch.device("cpu"))
    special = [1e-8, -1e-8, 65519.0, 65520.0, -1e9, 3.4e38, torch.inf, -torch.inf, 0.0, -0.0]
    value = torch.tensor([*special, torch.nan, 1.00390625, 1.01171875, 6e-8, 1e-40, -3.0])
    qkv = torch.cat((torch.zeros(32), value))[None]
    angles = torch.zeros(1, 8)
    slots = torch.tensor([2], dtype=torch.int32)
    RotateAndStore(angles.cos(), angles.sin(), slots, shape, 1)(qkv, pages.layer(0))
    found = pages.layer(0).values[2 * 16 : 3 * 16]
    torch.testing.assert_close(found, value.to(form.dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("form", [FP8, INT8], ids=lambda form: form.name)
@pytest.mark.parametrize("head_dim", [16, 24, 64, 128])
def test_rows_of_any_size_get_the_bits_that_torch_gives_them(
    form: PageFormat, head_dim: int
) -> None:
    rows = torch.randn(64, head_dim) * torch.logspace(-44, 38, 64)[:, None]
    rows[5], rows[6, 1:], rows[7, 3] = 0.0, 0.0, -0.0
    rows[8, 2], rows[9, 2], rows[10, 2] = torch.nan, torch.inf, -torch.inf
    rows[11] = torch.linspace(-1, 1, head_dim)  # with ties
    shape = PageShape(1, 1, head_dim, 16, form)
    expected, found = (KVPages(shape, 4, torch.device("cpu")) for _ in range(2))
    slots = torch.randperm(64).int()
    keys = mix(rows) if form.mixes_keys else rows
    expected.layer(0).store(expected.slot_rows(slots), keys[:, None], rows[:, None])
    angles = torch.zeros(64, head_dim // 2)
    rotate = RotateAndStore(angles.cos(), angles.sin(), slots, shape, 1)
    rotate(torch.cat((torch.zeros(64, head_dim), rows, rows), dim=1), found.layer(0))
    # Turning keys by no angle may change the sign of a zero: values alone are as they came.
    first_scale = shape.scales_offset + 2 * 16
    first_element = 0 if form == INT8 else shape.plane_bytes
    for part in (slice(first_element, shape.scales_offset), slice(first_scale, None)):
        assert torch.equal(found.data[:, part], expected.data[:, part])
    read, _ = found.layer(0).read(found.block_rows(torch.arange(4)), torch.float32)
    assert read[0, slots[[8, 9, 10]].long()].isnan().all()
