"""Paged attention by itself: our kernels against torch's operations, in turns on the same pages.

    python -m benchmarks.attention [--shape smollm2-135m] [--pages fp8] [--threads 2]

Times one step's attention over several layers, each of which has pages of its own, for steps as
the engine makes them. Prints medians per layer: milliseconds, GFLOP/s (of the products, visible
scores only) and GB/s (keys and values that the tokens attend to, as if each sequence read its
own), then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.tables import print_table
from cache.page_formats import PAGE_FORMATS
from cache.pages import KVPages, PageShape
from gpu_worker.attention.cpu import CpuAttention
from gpu_worker.attention.interface import AttentionBackend, HeadMap
from gpu_worker.attention.native import NativeAttention
from gpu_worker.kernels import library
from gpu_worker.step_plan import StepPlan

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's heads."""

    num_query_heads: int
    num_kv_heads: int
    head_dim: int


SHAPES = {"smollm2-135m": Shape(9, 3, 64), "llama-3-8b": Shape(32, 8, 128)}


@dataclass(frozen=True, slots=True)
class Case:
    """A step: each sequence has so many new tokens and so many before them.

    The sequences of each of `num_groups` have their first `num_shared` tokens in the same blocks.
    """

    name: str
    sequences: tuple[tuple[int, int], ...]
    num_shared: int = 0
    num_groups: int = 1

    def visible_scores(self) -> int:
        """Pairs of a token and a key that it sees."""
        return sum(new * before + new * (new + 1) // 2 for new, before in self.sequences)

    def num_keys(self) -> int:
        """Keys that the sequences attend to."""
        return sum(new + before for new, before in self.sequences)

    def plan(self) -> StepPlan:
        """Block tables count up, but for what is shared."""
        lens = [new + before for new, before in self.sequences]
        num_shared = self.num_shared // BLOCK_SIZE
        next_block = num_shared * self.num_groups
        tables = []
        for i, length in enumerate(lens):
            first = i * self.num_groups // len(lens) * num_shared
            own = -(-length // BLOCK_SIZE) - num_shared
            tables.append([*range(first, first + num_shared), *range(next_block, next_block + own)])
            next_block += own
        widest = max(map(len, tables))
        news = [new for new, _ in self.sequences]
        positions = [p for new, before in self.sequences for p in range(before, before + new)]
        no_tokens = torch.zeros(len(positions), dtype=torch.int32)
        return StepPlan(
            token_ids=no_tokens,
            positions=torch.tensor(positions, dtype=torch.int32),
            slot_mapping=no_tokens,
            query_starts=torch.tensor([0, *news]).cumsum(0).to(torch.int32),
            context_lens=torch.tensor(lens, dtype=torch.int32),
            block_tables=torch.tensor([t + [0] * (widest - len(t)) for t in tables]).int(),
            logits_rows=no_tokens[:0],
        )


CASES = (
    Case("decode 1 x 512", ((1, 511),)),
    Case("decode 64 x 512", ((1, 511),) * 64),
    Case("decode 96 x 1088, 4 prefixes of 1024", ((1, 1087),) * 96, 1024, 4),
    Case("decode 1 x 8192", ((1, 8191),)),
    Case("prefill 900", ((900, 0),)),
    Case("chunk of 256 after 1024", ((256, 1024),)),
    Case("24 suffixes of 48, prefix of 1024", ((48, 1024),) * 24, 1024, 1),
    Case("chunk of 256 + 48 decodes of 300", ((256, 256), *(((1, 299),) * 48))),
)


def main() -> None:
    """Measure, and print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--pages", choices=PAGE_FORMATS, default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--native-only", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    library.set_num_threads(arguments.threads)
    figures = {
        case.name: measure(case, SHAPES[arguments.shape], arguments)
        for case in CASES
        if arguments.only in case.name
    }
    print_table(
        ("case", "native ms", "GFLOP/s", "GB/s", "torch ms", "torch / native"),
        [(name, *(f"{f[k]:.{d}f}" for k, d in COLUMNS)) for name, f in figures.items()],
    )
    report = {
        "benchmark": "attention",
        "machine": f"{machine()}, kernels for {library.isa()}",
        "shape": arguments.shape,
        "pages": arguments.pages,
        "threads": arguments.threads,
        "layers": arguments.layers,
        "rounds": arguments.rounds,
        "cases": figures,
    }
    print(json.dumps(report))


COLUMNS = (
    ("native_ms", 3),
    ("native_gflops", 0),
    ("native_gb_per_s", 1),
    ("torch_ms", 3),
    ("ratio", 2),
)


def measure(case: Case, shape: Shape, arguments: argparse.Namespace) -> dict[str, float]:
    """Both implementations in turns, after a round to warm up."""
    plan = case.plan()
    form = PAGE_FORMATS[arguments.pages]
    page_shape = PageShape(arguments.layers, shape.num_kv_heads, shape.head_dim, BLOCK_SIZE, form)
    pages = KVPages(page_shape, int(plan.block_tables.max()) + 1, torch.device("cpu"))
    _fill(pages)
    group = shape.num_query_heads // shape.num_kv_heads
    heads = HeadMap.build(
        tuple(q // group for q in range(shape.num_query_heads)), torch.device("cpu")
    )
    query = torch.randn(plan.num_tokens, shape.num_query_heads, shape.head_dim)
    contenders: list[tuple[AttentionBackend, Tensor]] = [(NativeAttention(), query)]
    if not arguments.native_only:
        # In the pages' numbers where torch can compute in them: it then copies without widening.
        dtype = torch.float32 if form.has_scales else form.dtype
        contenders.append((CpuAttention, query.to(dtype)))
    times_s: list[list[float]] = [[] for _ in contenders]
    for _ in range(1 + arguments.rounds):
        for (backend, queries), found in zip(contenders, times_s, strict=True):
            found.append(time_step(backend, plan, pages, queries, heads))
    seconds = [statistics.median(found[1:]) / arguments.layers for found in times_s]
    flops = 4 * shape.num_query_heads * shape.head_dim * case.visible_scores()
    num_bytes = page_shape.bytes_per_block / BLOCK_SIZE / arguments.layers * case.num_keys()
    return {
        "native_ms": seconds[0] * 1e3,
        "native_gflops": flops / seconds[0] / 1e9,
        "native_gb_per_s": num_bytes / seconds[0] / 1e9,
        "torch_ms": seconds[-1] * 1e3,
        "ratio": seconds[-1] / seconds[0],
    }


def _fill(pages: KVPages) -> None:
    shape = pages.shape
    slots = torch.arange(pages.num_blocks * shape.block_size)
    for layer in range(shape.num_layers):
        keys, values = torch.randn(2, len(slots), shape.num_kv_heads, shape.head_dim)
        pages.layer(layer).store(pages.slot_rows(slots), keys, values)


def time_step(
    backend: AttentionBackend, plan: StepPlan, pages: KVPages, query: Tensor, heads: HeadMap
) -> float:
    """Seconds of one step's attention in all layers, preparation included."""
    started = time.perf_counter()
    attend = backend(plan, pages)
    for layer in range(pages.shape.num_layers):
        attend(query, pages.layer(layer), heads, query.shape[-1] ** -0.5)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
