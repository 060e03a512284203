"""Loading a large sharded checkpoint, against what the disk gives `dd`.

    python -m benchmarks.checkpoint_loading [--size-gb 2] [--rounds 3] [--dtype auto] [--folder DIR]

Writes a checkpoint of random bfloat16 weights in the shapes of a Llama model, in safetensors shards
of 512 MB, and then measures in turns, each time with its files dropped from the system's cache:
`dd` reading all of them, and our ranks loading it at tensor-parallel sizes 1 and 2, from opening
the checkpoint to weights that are packed and in memory. Ranks share the machine's cores, and have
their imports behind them when the clock starts. Prints medians and the ratios to `dd`. DIR must be
on the disk to be measured, not in memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.startup import drop_from_cache

SIZES = (1, 2)
SHARD_BYTES = 512 * 10**6
TIMEOUT_S = 600.0
HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCAB = 2048, 8192, 32, 8, 32_000
LAYER_SHAPES = {
    "input_layernorm": (HIDDEN,),
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
    "self_attn.v_proj": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "post_attention_layernorm": (HIDDEN,),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}


def main() -> None:
    """Measure, and print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size-gb", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument(
        "--folder", type=Path, help="where to write; the temporary one if not given"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        checkpoint = Path(folder)
        write_checkpoint(checkpoint, int(arguments.size_gb * 1e9))
        size_bytes = sum(path.stat().st_size for path in _shards(checkpoint))
        seconds: dict[str, list[float]] = {"dd": [], **{f"tp{size}": [] for size in SIZES}}
        for _ in range(arguments.rounds):
            seconds["dd"].append(dd_s(checkpoint))
            for size in SIZES:
                seconds[f"tp{size}"].append(load_s(checkpoint, size, arguments.dtype))
    report: dict[str, Any] = {
        "benchmark": "checkpoint_loading",
        "machine": machine(),
        "size_gb": size_bytes / 1e9,
        "dtype": arguments.dtype,
        "rounds": arguments.rounds,
    }
    for name, measured in seconds.items():
        report[f"{name}_gb_per_s"] = statistics.median(size_bytes / 1e9 / s for s in measured)
    for size in SIZES:
        ratios = [dd / ours for dd, ours in zip(seconds["dd"], seconds[f"tp{size}"], strict=True)]
        report[f"tp{size}_to_dd"] = statistics.median(ratios)
    for name, value in report.items():
        print(f"{name:15} {value:.2f}" if isinstance(value, float) else f"{name:15} {value}")
    print(json.dumps(report))


def write_checkpoint(directory: Path, size_bytes: int) -> None:
    """A Llama checkpoint of at least `size_bytes`, in whole layers."""
    layer_bytes = sum(2 * torch.Size(shape).numel() for shape in LAYER_SHAPES.values())
    num_layers = max(1, -(-(size_bytes - 4 * VOCAB * HIDDEN) // layer_bytes))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(num_layers):
        for name, shape in LAYER_SHAPES.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    _write_config(directory, num_layers)
    generator = torch.Generator().manual_seed(0)
    file_of: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        shard[name] = torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
        full = sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES
        if full or name == "lm_head.weight":
            file_name = f"model-{len(set(file_of.values())) + 1:05}.safetensors"
            save_file(shard, directory / file_name)
            file_of |= dict.fromkeys(shard, file_name)
            shard = {}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": file_of}))


def _write_config(directory: Path, num_layers: int) -> None:
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": num_layers,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "eos_token_id": 2,
    }
    (directory / "config.json").write_text(json.dumps(config))


def dd_s(checkpoint: Path) -> float:
    """Seconds that `dd` takes to read all shards, one after the other."""
    drop_from_cache(checkpoint)
    started_s = time.perf_counter()
    for path in _shards(checkpoint):
        command = ["dd", f"if={path}", "of=/dev/null", "bs=1M", "status=none"]
        subprocess.run(command, check=True)
    return time.perf_counter() - started_s


def load_s(checkpoint: Path, size: int, dtype: str) -> float:
    """Seconds until `size` ranks, each a process, have loaded their parts."""
    drop_from_cache(checkpoint)
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(size + 1)
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(
                target=_load_as, args=(rank, size, Path(folder), checkpoint, dtype, barrier)
            )
            for rank in range(size)
        ]
        for process in ranks:
            process.start()
        try:
            barrier.wait(TIMEOUT_S)  # imported, and met
            started_s = time.perf_counter()
            barrier.wait(TIMEOUT_S)
            return time.perf_counter() - started_s
        finally:
            for process in ranks:
                process.join(TIMEOUT_S)


def _load_as(
    rank: int, size: int, folder: Path, checkpoint: Path, dtype: str, barrier: Barrier
) -> None:
    from gpu_worker.model_runner import ModelRunner
    from gpu_worker.tensor_parallel import TensorParallelGroup

    num_threads = max(1, (os.cpu_count() or 1) // size)
    torch.set_num_threads(num_threads)
    device = torch.device("cpu")
    group = TensorParallelGroup.connect(rank, size, folder / "rendezvous", device, TIMEOUT_S)
    barrier.wait(TIMEOUT_S)
    ModelRunner(checkpoint, group=group, dtype=dtype, num_blocks=1)
    barrier.wait(TIMEOUT_S)
    group.close()


def _shards(checkpoint: Path) -> list[Path]:
    return sorted(checkpoint.glob("*.safetensors"))


if __name__ == "__main__":
    main()
