"""Rotated queries, and keys and values in their pages, as the plain layers make them."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import rms_norm

from cache.pages import KVPages, PageShape
from gpu_worker.kernels import library
from gpu_worker.kernels.rotary import RotateAndStore
from gpu_worker.layers.rotary import Rotation

pytestmark = pytest.mark.skipif(library.isa() is None, reason="no compiled kernels here")

NUM_QUERIES, NUM_KV = 5, 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("head_dim", "block_size", "num_tokens"),
    [(8, 1, 50), (64, 16, 1), (64, 16, 50), (80, 16, 50), (128, 8, 50), (256, 16, 50)],
)
@pytest.mark.parametrize("normalize", [False, True])
def test_equals_the_plain_layers(
    dtype: torch.dtype, head_dim: int, block_size: int, num_tokens: int, normalize: bool
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
    shape = PageShape(3, NUM_KV, head_dim, block_size, dtype)
    expected, found = (KVPages(shape, num_blocks, torch.device("cpu")) for _ in range(2))
    layer = expected.layer(1)
    layer.store(expected.slot_rows(slots), key.to(dtype), value.to(dtype))

    rotate = RotateAndStore(rotation.cos, rotation.sin, slots, shape, NUM_QUERIES)
    rotate(qkv, found.layer(1), query_norm, key_norm, eps=1e-6)
    found_query = qkv.view(num_tokens, -1, head_dim)[:, :NUM_QUERIES]
    torch.testing.assert_close(found_query, query, rtol=2e-6, atol=2e-6)
    # A sum that differs in its last bit may round to the next 16-bit number.
    tolerance = max(2e-6, torch.finfo(dtype).eps)
    torch.testing.assert_close(found.data, expected.data, rtol=tolerance, atol=2e-6)
    # Values are only rounded, all in the same way.
    assert torch.equal(found.data[:, :, 1], expected.data[:, :, 1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_beyond_a_number_format_become_what_torch_makes_of_them(dtype: torch.dtype) -> None:
    shape = PageShape(1, 1, 16, 4, dtype)
    pages = KVPages(shape, 1, torch.device("cpu"))
    special = [1e-8, -1e-8, 65519.0, 65520.0, -1e9, 3.4e38, torch.inf, -torch.inf, 0.0, -0.0]
    value = torch.tensor([*special, torch.nan, 1.00390625, 1.01171875, 6e-8, 1e-40, -3.0])
    qkv = torch.cat((torch.zeros(32), value))[None]
    angles = torch.zeros(1, 8)
    slots = torch.tensor([2], dtype=torch.int32)
    RotateAndStore(angles.cos(), angles.sin(), slots, shape, 1)(qkv, pages.layer(0))
    torch.testing.assert_close(
        pages.data[0, 0, 1, 0, 2], value.to(dtype), rtol=0, atol=0, equal_nan=True
    )
