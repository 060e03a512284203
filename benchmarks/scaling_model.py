"""How long a step takes on 1, 2, 4 and 8 GPUs: arithmetic, nothing is run.

    python -m benchmarks.scaling_model

Prints the tables of docs/SCALING.md, which explains the model and where its figures come from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

SIZES = (1, 2, 4, 8)
_WEIGHT_BYTES = 2
_ELEMENTWISE_PASSES = 10
"""Times that a layer's norms and residual sums read or write the hidden values, on every rank."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder with grouped-query attention and a gated feed-forward block, in 16 bits."""

    name: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int

    @property
    def weight_bytes(self) -> int:
        """Of the whole model, embedding and head apart from each other."""
        heads = 2 * self.num_heads + 2 * self.num_kv_heads
        layer = self.hidden_size * (heads * self.head_dim + 3 * self.intermediate_size)
        vocabulary = 2 * self.hidden_size * self.vocab_size
        return _WEIGHT_BYTES * (self.num_layers * layer + vocabulary)

    def kv_bytes(self, num_tokens: int) -> int:
        """Of `num_tokens` in the cache, over all layers."""
        return 2 * _WEIGHT_BYTES * self.num_layers * self.num_kv_heads * self.head_dim * num_tokens


@dataclass(frozen=True, slots=True)
class Machine:
    """What one GPU and the links between them can really do.

    An all-reduce of n ranks takes `all_reduce_latency_s` plus 2 (n - 1) / n of its bytes over
    `link_bytes_per_s`.
    """

    flops_per_s: float
    attention_flops_per_s: float
    memory_bytes_per_s: float
    memory_bytes: float
    link_bytes_per_s: float
    all_reduce_latency_s: float


@dataclass(frozen=True, slots=True)
class Load:
    """A step of `num_seqs` sequences with `num_new` tokens each, the last at `context_len`."""

    name: str
    num_seqs: int
    num_new: int
    context_len: int

    @property
    def num_tokens(self) -> int:
        """Rows of the step."""
        return self.num_seqs * self.num_new


@dataclass(frozen=True, slots=True)
class Step:
    """Where a step's time goes on each of `size` ranks."""

    size: int
    linear_s: float
    attention_s: float
    elementwise_s: float
    all_reduce_s: float

    @property
    def total_s(self) -> float:
        """Nothing of it overlaps."""
        return self.linear_s + self.attention_s + self.elementwise_s + self.all_reduce_s


LLAMA_8B = Shape("Llama-3-8B", 4096, 32, 32, 8, 128, 14336, 128256)
LLAMA_70B = Shape("Llama-3-70B", 8192, 80, 64, 8, 128, 28672, 128256)

H100 = Machine(
    flops_per_s=0.7 * 989e12,
    attention_flops_per_s=0.5 * 989e12,
    memory_bytes_per_s=0.8 * 3.35e12,
    memory_bytes=80e9,
    link_bytes_per_s=370e9,
    all_reduce_latency_s=10e-6,
)

LOADS = (
    Load("prefill 1 x 512", 1, 512, 512),
    Load("prefill 8 x 512", 8, 512, 512),
    Load("prefill 2 x 4,096", 2, 4096, 4096),
    Load("decode 1, context 1,000", 1, 1, 1000),
    Load("decode 32, context 1,000", 32, 1, 1000),
    Load("decode 128, context 1,000", 128, 1, 1000),
)


def predict(shape: Shape, machine: Machine, load: Load, size: int) -> Step:
    """The time of one step on `size` ranks, of the rank that has most to do."""
    heads = -(-shape.num_heads // size)
    kv_heads = -(-shape.num_kv_heads // size)
    columns = -(-shape.intermediate_size // size)
    hidden, dim, rows = shape.hidden_size, shape.head_dim, load.num_tokens
    products = (
        (rows, hidden, (heads + 2 * kv_heads) * dim),
        (rows, heads * dim, hidden),
        (rows, hidden, 2 * columns),
        (rows, columns, hidden),
    )
    head = (load.num_seqs, hidden, -(-shape.vocab_size // size))
    layer_linear_s = sum(_product_s(machine, *product) for product in products)
    hidden_bytes = float(rows * hidden * _WEIGHT_BYTES)
    # One more than two in each layer: the embedding is spread over the ranks as well.
    num_all_reduces = 2 * shape.num_layers + 1
    return Step(
        size=size,
        linear_s=shape.num_layers * layer_linear_s + _product_s(machine, *head),
        attention_s=shape.num_layers * _attention_s(machine, load, heads, kv_heads, dim),
        elementwise_s=shape.num_layers
        * (_ELEMENTWISE_PASSES * hidden_bytes / machine.memory_bytes_per_s),
        all_reduce_s=num_all_reduces * all_reduce_s(machine, hidden_bytes, size),
    )


def all_reduce_s(machine: Machine, num_bytes: float, size: int) -> float:
    """One all-reduce of `num_bytes` on every rank."""
    if size == 1:
        return 0.0
    moved = 2 * (size - 1) / size * num_bytes
    return machine.all_reduce_latency_s + moved / machine.link_bytes_per_s


def fits(shape: Shape, machine: Machine, load: Load, size: int) -> bool:
    """Whether weights and cache leave a tenth of each GPU's memory to everything else."""
    cache = shape.kv_bytes(load.num_seqs * load.context_len)
    return (shape.weight_bytes + cache) / size <= 0.9 * machine.memory_bytes


def _product_s(machine: Machine, rows: int, inputs: int, outputs: int) -> float:
    """A roofline: the weights must be read, and the sums computed; the slower one counts."""
    reading_s = _WEIGHT_BYTES * inputs * outputs / machine.memory_bytes_per_s
    return max(reading_s, 2.0 * rows * inputs * outputs / machine.flops_per_s)


def _attention_s(machine: Machine, load: Load, heads: int, kv_heads: int, dim: int) -> float:
    """Reading the cache for a decode, computing for a prefill (half of it is masked)."""
    cache_bytes = 2.0 * _WEIGHT_BYTES * load.num_seqs * load.context_len * kv_heads * dim
    mean_context = load.context_len - load.num_new / 2
    flops = 4.0 * load.num_tokens * mean_context * heads * dim
    return max(cache_bytes / machine.memory_bytes_per_s, flops / machine.attention_flops_per_s)


def main() -> None:
    """Print the tables."""
    for shape in (LLAMA_8B, LLAMA_70B):
        print(f"\n### {shape.name}: {shape.weight_bytes / 1e9:.1f} GB of weights\n")
        print("\n".join(_table(shape, H100)))
    slow = replace(H100, all_reduce_latency_s=2 * H100.all_reduce_latency_s)
    print("\n### The same with all-reduces of twice the latency (Llama-3-8B)\n")
    print("\n".join(_table(LLAMA_8B, slow)))


def _table(shape: Shape, machine: Machine) -> Iterator[str]:
    """Milliseconds, the speed-up over one GPU, and the share of the all-reduces."""
    yield "| step | " + " | ".join(f"TP={size}" for size in SIZES) + " |"
    yield "| --- " * (1 + len(SIZES)) + "|"
    for load in LOADS:
        alone_s = predict(shape, machine, load, 1).total_s
        cells = []
        for size in SIZES:
            step = predict(shape, machine, load, size)
            cell = f"{step.total_s * 1e3:.2f} ms"
            if size > 1:
                share = step.all_reduce_s / step.total_s
                cell += f", {alone_s / step.total_s:.2f} x, {share:.0%}"
            cells.append(cell if fits(shape, machine, load, size) else f"({cell})")
        yield f"| {load.name} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
