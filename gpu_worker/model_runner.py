"""The model on one rank: its weights, its KV-cache pages, and one method that runs a step."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
import torch
from torch import Tensor

from cache.page_formats import PageFormat
from cache.pages import KVPages, PageShape
from gpu_worker.layer_progress import LayerCounter
from gpu_worker.layers.choice import choose_operations
from gpu_worker.layers.sharding import max_kv_heads, shard_model
from gpu_worker.memory import default_kv_cache_bytes
from gpu_worker.models.config import ModelConfig
from gpu_worker.models.content_digest import content_digest
from gpu_worker.models.loading import load_decoder
from gpu_worker.models.weights import open_model
from gpu_worker.precision import choose_precision
from gpu_worker.step_plan import StepPlan
from gpu_worker.tensor_parallel import TensorParallelGroup
from wire.errors import ModelError

if TYPE_CHECKING:
    from service.settings import KVCacheDtype, Quantization


class ModelRunner:
    """Runs the steps that the engine plans. It knows blocks and rows, but no requests.

    `config.max_model_len` is the context that can be served: the model's, or what `max_model_len`
    or the KV-cache's size leave of it. `num_blocks` is the same on every rank, and so is
    `content_digest`, which names the model by its weights. `load_s` is how long loading took.
    """

    def __init__(
        self,
        model_path: Path,
        *,
        group: TensorParallelGroup,
        dtype: str = "float32",
        quantization: Quantization = "none",
        kv_cache_dtype: KVCacheDtype = "auto",
        device: torch.device | None = None,
        block_size: int = 16,
        num_blocks: int | None = None,
        kv_cache_bytes: int | None = None,
        max_model_len: int | None = None,
        layers: LayerCounter | None = None,
    ) -> None:
        """Load this rank's part of the model and reserve the pages; `layers` counts what it runs.

        `dtype` is a torch dtype's name, or "auto" for what this machine is best at.
        `num_blocks` wins over `kv_cache_bytes`, which is per rank; with neither, see
        `gpu_worker.memory`. Raises ModelError for bad files, for more ranks than query heads, or
        when there is no room for a single block.
        """
        started = time.perf_counter()
        self.device = device if device is not None else torch.device("cpu")
        self.group = group
        self.config, reader = open_model(model_path, max_model_len)
        self.precision = choose_precision(
            dtype,
            quantization,
            kv_cache_dtype,
            self.device,
            head_dim=self.config.head_dim,
        )
        operations = choose_operations(self.precision, self.device)
        self._decoder = load_decoder(
            self.config, reader, group, self.precision, operations, self.device
        )
        self.content_digest = content_digest(self.config, reader.stored())
        self._pages = self._reserve_pages(block_size, num_blocks, kv_cache_bytes)
        self._limit_context_to_pages()
        self._layers = layers or LayerCounter()
        self.load_s = time.perf_counter() - started
        structlog.get_logger(__name__).info(
            "model_loaded",
            rank=group.rank,
            architecture=self.config.architecture,
            precision=self.precision.name,
            sharded_weight_bytes=self.num_sharded_bytes,
            num_blocks=self.num_blocks,
            kv_cache_bytes=self._pages.data.nbytes,
            load_s=round(self.load_s, 3),
        )

    @property
    def pages(self) -> KVPages:
        """This rank's KV-cache."""
        return self._pages

    @property
    def num_blocks(self) -> int:
        """Blocks in the KV-cache."""
        return self._pages.num_blocks

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self._pages.shape.block_size

    @property
    def num_sharded_bytes(self) -> int:
        """Bytes on this rank of the weights that are shared out: all but the norms'."""
        return self._decoder.num_sharded_bytes

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> Tensor | None:
        """Run one step; every rank must be given the same plan.

        Returns (num_samples, vocab_size) float32 logits, row i for `plan.logits_rows[i]`, on
        rank 0 and None on the others. They are the caller's to change, and valid until the next
        step.
        """
        if len(plan.wiped_blocks):
            self._pages.wipe(self._index(plan.wiped_blocks))
        return self._decoder(
            plan,
            token_ids=self._index(plan.token_ids),
            logits_rows=self._index(plan.logits_rows),
            pages=self._pages,
            done=self._layers,
        )

    def _index(self, values: Tensor) -> Tensor:
        return values.to(self.device, torch.int64)

    def _reserve_pages(
        self, block_size: int, num_blocks: int | None, kv_cache_bytes: int | None
    ) -> KVPages:
        config, group, form = self.config, self.group, self.precision.pages
        if num_blocks is None:
            # Counted with the most heads that any rank has, so that all come to the same number.
            widest = _page_shape(config, max_kv_heads(config, group.size), block_size, form)
            if kv_cache_bytes is None:
                kv_cache_bytes = default_kv_cache_bytes(
                    self.device,
                    group.size,
                    bytes_per_token=widest.bytes_per_block // block_size,
                    max_model_len=config.max_model_len,
                )
            num_blocks = group.minimum(kv_cache_bytes // widest.bytes_per_block)
            if num_blocks < 1:
                raise ModelError(
                    f"{kv_cache_bytes} bytes are too few for one block of the KV-cache, which "
                    f"takes {widest.bytes_per_block}; give the KV-cache more memory"
                )
        num_kv_heads = len(shard_model(config, group.size, group.rank).kv_heads)
        return KVPages(_page_shape(config, num_kv_heads, block_size, form), num_blocks, self.device)

    def _limit_context_to_pages(self) -> None:
        """A sequence cannot outgrow the cache, however long the model's context is."""
        num_slots = self.num_blocks * self.block_size
        if num_slots < self.config.max_model_len:
            structlog.get_logger(__name__).warning(
                "context_limited_by_kv_cache",
                model_context_len=self.config.max_model_len,
                max_model_len=num_slots,
            )
            self.config = replace(self.config, max_model_len=num_slots)


def _page_shape(
    config: ModelConfig, num_kv_heads: int, block_size: int, form: PageFormat
) -> PageShape:
    return PageShape(config.num_layers, num_kv_heads, config.head_dim, block_size, form)
