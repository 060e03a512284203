"""Stand-ins at the engine's seams: a model that is a hash function, options for small engines."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gpu_worker.engine.engine import Engine, EngineModel
from gpu_worker.rank_options import RankOptions
from gpu_worker.rank_protocol import SequenceOutput, StepOutput
from gpu_worker.step_plan import StepPlan
from wire.ids import RequestId, token_ids
from wire.messages import Assignment
from wire.sampling import SamplingParams

VOCAB_SIZE = 97
NO_TOKEN = -1


def hashed_logits(context: Iterable[int], vocab_size: int = VOCAB_SIZE) -> npt.NDArray[np.float32]:
    """Logits that depend on every token before them: (vocab_size,)."""
    seed = zlib.crc32(np.array(list(context), np.int32).tobytes())
    return np.random.default_rng(seed).normal(0, 3, vocab_size).astype(np.float32)


def greedy_continuation(prompt: Iterable[int], num_tokens: int) -> list[int]:
    """What a greedy engine must generate with a `HashingRunner`."""
    tokens = list(prompt)
    start = len(tokens)
    for _ in range(num_tokens):
        tokens.append(int(hashed_logits(tokens).argmax()))
    return tokens[start:]


class HashingRunner:
    """Keeps token ids where a model keeps keys and values, and hashes what attention would see.

    So a wrong slot, a stale block or a wrong block table changes the output. It also checks that
    no sequence writes into a block that another one reads or writes in the same step. Blocks are
    wiped and copied to host memory and back as the plan says.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        vocab_size: int = VOCAB_SIZE,
        num_host_blocks: int = 0,
    ) -> None:
        self.num_steps = 0
        self.num_computed_tokens = 0
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._slots = np.full(num_blocks * block_size, NO_TOKEN, np.int32)
        self._host = np.full((num_host_blocks, block_size), NO_TOKEN, np.int32)

    def execute(self, plan: StepPlan) -> Tensor:
        self.num_steps += 1
        self.num_computed_tokens += plan.num_tokens
        self._prepare(plan)
        if not plan.num_tokens:
            return torch.empty((0, 0))
        self._check_disjoint(plan)
        self._slots[plan.slot_mapping.numpy()] = plan.token_ids.numpy()
        last_rows = plan.query_starts[1:] - 1
        logits = {
            int(row): hashed_logits(self._context(plan, i), self._vocab_size)
            for i, row in enumerate(last_rows)
            if row in plan.logits_rows
        }
        rows = [logits[int(row)] for row in plan.logits_rows]
        return torch.from_numpy(np.array(rows).reshape(len(rows), self._vocab_size))

    def _prepare(self, plan: StepPlan) -> None:
        blocks = self._slots.reshape(-1, self._block_size)
        for block_id, slot in plan.copies_out.tolist():
            self._host[slot] = blocks[block_id]
        blocks[plan.wiped_blocks.numpy()] = NO_TOKEN
        for block_id, slot in plan.copies_in.tolist():
            blocks[block_id] = self._host[slot]

    def _context(self, plan: StepPlan, i: int) -> npt.NDArray[np.int32]:
        positions = np.arange(int(plan.context_lens[i]))
        blocks = plan.block_tables[i].numpy()[positions // self._block_size]
        context = self._slots[blocks * self._block_size + positions % self._block_size]
        assert NO_TOKEN not in context, "a sequence reads what nobody has written"
        return context

    def _check_disjoint(self, plan: StepPlan) -> None:
        slots = plan.slot_mapping.tolist()
        assert len(set(slots)) == len(slots), "two tokens go to one slot"
        starts = plan.query_starts.tolist()
        for i in range(plan.num_seqs):
            written = {slot // self._block_size for slot in slots[starts[i] : starts[i + 1]]}
            for j in range(plan.num_seqs):
                num_blocks = -(-int(plan.context_lens[j]) // self._block_size)
                read = set(plan.block_tables[j, :num_blocks].tolist())
                assert i == j or not written & read, "a block is written while another reads it"


def rank_options(
    *,
    model_path: str = "unused",
    block_size: int = 4,
    num_blocks: int | None = None,
    max_model_len: int | None = None,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 32,
    prefix_caching: bool = True,
    host_cache_bytes: int = 0,
    stub_step_s: float = 0.0,
    progress_interval_s: float = 1.0,
) -> RankOptions:
    return RankOptions(
        model_path=model_path,
        model_name="model",
        dtype="float32",
        quantization="none",
        kv_cache_dtype="auto",
        cpu_isa="auto",
        block_size=block_size,
        kv_cache_bytes=None,
        host_cache_bytes=host_cache_bytes,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        num_threads=1,
        collective_timeout_s=60.0,
        progress_interval_s=progress_interval_s,
        log_level="warning",
        log_format="auto",
        num_blocks=num_blocks,
        prefix_caching=prefix_caching,
        stub_step_s=stub_step_s,
    )


def hashing_engine(
    *,
    num_blocks: int = 256,
    max_model_len: int = 512,
    eos_token_ids: tuple[int, ...] = (),
    options: RankOptions | None = None,
    num_host_blocks: int = 0,
) -> tuple[Engine, HashingRunner]:
    """An engine over a `HashingRunner`."""
    options = options or rank_options()
    runner = HashingRunner(
        num_blocks=num_blocks, block_size=options.block_size, num_host_blocks=num_host_blocks
    )
    model = EngineModel(
        VOCAB_SIZE,
        max_model_len,
        eos_token_ids,
        num_blocks,
        "fake",
        num_host_blocks=num_host_blocks,
    )
    return Engine(runner, model, options), runner


def assignment(
    request_id: str,
    prompt: Iterable[int],
    sampling: SamplingParams | None = None,
    *,
    fence: int = 1,
    generated: Iterable[int] = (),
    cache_salt: bytes = b"",
) -> Assignment:
    return Assignment(
        request_id=RequestId(request_id),
        fence=fence,
        prompt_token_ids=token_ids(prompt),
        sampling=sampling or SamplingParams(temperature=0.0, max_tokens=16),
        stream=False,
        cache_salt=cache_salt,
        generated=token_ids(generated),
    )


def run_to_end(
    engine: Engine, arrivals: Mapping[int, list[Assignment]], *, max_steps: int = 10_000
) -> dict[str, list[SequenceOutput]]:
    """Add each assignment before the step of its number; the outputs of each request, in order."""
    outputs: dict[str, list[SequenceOutput]] = {}
    last_arrival = max(arrivals)
    for step in range(max_steps):
        for arriving in arrivals.get(step, ()):
            engine.add(arriving)
        if step >= last_arrival and not engine.has_work:
            break
        for output in spelled_out(engine, engine.step()):
            outputs.setdefault(output.request_id, []).append(output)
        engine.check_integrity()
    assert not engine.has_work, f"still busy after {max_steps} steps"
    return outputs


def spelled_out(engine: Engine, step: StepOutput) -> list[SequenceOutput]:
    """All outputs of the engine's latest step, with an object also for what came in columns."""
    going_on = {sequence.index: sequence for sequence in engine._sequences.values()}
    columns = [
        SequenceOutput(
            request_id=going_on[index].request_id,
            fence=going_on[index].assignment.fence,
            token_ids=token_ids((token_id,)),
            num_prompt_tokens=going_on[index].num_prompt_tokens,
            num_cached_tokens=going_on[index].num_cached_tokens or 0,
        )
        for index, token_id in zip(step.indices, step.token_ids, strict=True)
    ]
    return [*step.outputs, *columns]


def tokens_of(outputs: Iterable[SequenceOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]
