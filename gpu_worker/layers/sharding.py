"""Which part of each weight matrix a tensor-parallel rank holds: plain integers, no tensors.

Query heads are dealt out in order and as evenly as they go; a rank also holds the key/value heads
that its query heads read. SmolLM2's 9 query and 3 key/value heads over 2 ranks:

    query head      0  1  2  3  4 | 5  6  7  8
    key/value head  0  0  0  1  1 | 1  2  2  2

so key/value head 1 lives on both. With more ranks than key/value heads, several ranks hold the
same one. Nothing can make up for a rank that has a head more: ranks meet after attention and
again after the feed-forward block.

Where a rank's part of a matrix is a part of its inputs, it is cut at multiples of `GROUP_LEN` if
the model's sizes allow it: quantized weights then have the same groups at every size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gpu_worker.models.config import ModelConfig
from wire.errors import ModelError

GROUP_LEN = 64
"""Inputs that share a scale in quantized weights."""

_VECTOR_LEN = 16


def even_split(total: int, size: int, rank: int, unit: int = 1) -> range:
    """The part of `range(total)` that is `rank`'s: contiguous; the first ones get the remainder.

    Parts are whole numbers of `unit`, which must divide `total`.
    """
    quotient, remainder = divmod(total // unit, size)
    start = rank * quotient + min(rank, remainder)
    return range(start * unit, (start + quotient + (rank < remainder)) * unit)


@dataclass(frozen=True, slots=True)
class ModelShard:
    """One rank's part of the model. All ranges count in the whole model's units.

    `query_heads` and `kv_heads` are heads; `mlp_columns` are columns of the intermediate
    activations; `vocab_rows` are token ids.
    """

    rank: int
    size: int
    query_heads: range
    kv_heads: range
    mlp_columns: range
    vocab_rows: range
    kv_head_of_query: tuple[int, ...]
    """Local query head -> local key/value head."""


def shard_model(config: ModelConfig, size: int, rank: int) -> ModelShard:
    """Rank `rank`'s part among `size`.

    Raises ModelError if there are more ranks than query heads, columns of the feed-forward block
    or tokens in the vocabulary, for then some would have none.
    """
    for what, count in (
        ("query heads", config.num_heads),
        ("feed-forward columns", config.intermediate_size),
        ("tokens in its vocabulary", config.vocab_size),
    ):
        if not 1 <= size <= count:
            raise ModelError(
                f"tensor-parallel size {size} does not fit a model of {count} {what}; "
                f"use 1 to {count}"
            )
    assert 0 <= rank < size
    group_len = config.num_heads // config.num_kv_heads
    query_heads = even_split(config.num_heads, size, rank, _head_unit(config, size))
    kv_heads = range(query_heads[0] // group_len, query_heads[-1] // group_len + 1)
    return ModelShard(
        rank=rank,
        size=size,
        query_heads=query_heads,
        kv_heads=kv_heads,
        mlp_columns=even_split(
            config.intermediate_size, size, rank, _column_unit(config.intermediate_size, size)
        ),
        vocab_rows=even_split(config.vocab_size, size, rank),
        kv_head_of_query=tuple(q // group_len - kv_heads.start for q in query_heads),
    )


def max_kv_heads(config: ModelConfig, size: int) -> int:
    """The most key/value heads that any of `size` ranks holds."""
    return max(len(shard_model(config, size, rank).kv_heads) for rank in range(size))


def _head_unit(config: ModelConfig, size: int) -> int:
    """Heads are dealt out several at a time if that gives whole groups and costs no balance."""
    unit = GROUP_LEN // math.gcd(GROUP_LEN, config.head_dim)
    if config.num_heads % unit:
        return 1
    most, fewest = (len(even_split(config.num_heads, size, r, unit)) for r in (0, size - 1))
    return unit if fewest > 0 and most == len(even_split(config.num_heads, size, 0)) else 1


def _column_unit(num_columns: int, size: int) -> int:
    """Whole groups, else whole vectors, as long as every rank has some."""
    for unit in (GROUP_LEN, _VECTOR_LEN):
        if num_columns % unit == 0 and num_columns // unit >= size:
            return unit
    return 1
