"""From logits to the next token of each sequence, for the whole batch at once.

    raw logits ──> log probabilities, where asked for
        │ penalties, then end-of-sequence and stop tokens masked before `min_tokens`
        ├──> greedy rows: argmax
        └──> others: temperature, min-p, top-k, top-p, one draw

On the CPU, the last two are kernels of ours that go through the logits row by row, each row in a
core's cache; elsewhere they are torch's operations on all rows at once, with the same outcome.

Log probabilities are those of the model itself, before penalties and temperature. When all rows
are greedy and none asks for anything, sampling is a single argmax.

A row whose logits are not finite (it holds a NaN or +inf, or nothing but -inf) gives no token. Its
maximum, which is needed anyway, tells: NaN counts as the greatest of all.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gpu_worker.engine.logit_adjustments import apply_penalties, mask_early_stops
from gpu_worker.engine.random_numbers import uniforms
from gpu_worker.engine.sequence import Sequence
from gpu_worker.engine.token_filters import draw, filter_thresholds
from gpu_worker.kernels import argmax as argmax_kernel
from gpu_worker.kernels import sampling as sampling_kernel
from gpu_worker.rank_protocol import RawLogprob
from wire.ids import token_ids

_MIN_TEMPERATURE = 1e-5
"""Lower ones act the same on float32 logits, and could divide by a zero."""

_NO_TOKEN = -1


class Sampled(NamedTuple):
    """The next token of each sequence, and its log probability where the request asks for it.

    The token is None where the sequence's logits are not finite.
    """

    token_ids: list[int | None]
    logprobs: list[RawLogprob | None] | None


class Sampler:
    """Keeps the sampling parameters of the running sequences in arrays, by their rows."""

    def __init__(self, *, max_num_seqs: int, vocab_size: int, use_kernels: bool) -> None:
        """`use_kernels`: for logits on the CPU; the compiled library must be there."""
        self._vocab_size = vocab_size
        self._use_kernels = use_kernels
        self._seeds = np.zeros(max_num_seqs, np.uint64)
        self._temperature = np.zeros(max_num_seqs, np.float32)
        self._top_k = np.zeros(max_num_seqs, np.int64)
        self._top_p = np.zeros(max_num_seqs, np.float32)
        self._min_p = np.zeros(max_num_seqs, np.float32)
        self._num_logprobs = np.zeros(max_num_seqs, np.int64)  # 0: none, n + 1: the n best
        self._is_plain = np.zeros(max_num_seqs, np.bool_)
        self._needs_mask = np.zeros(max_num_seqs, np.bool_)
        self._has_penalties = np.zeros(max_num_seqs, np.bool_)
        self._owners: list[Sequence | None] = [None] * max_num_seqs

    @torch.inference_mode()
    def sample(self, logits: Tensor, sequences: Seq[Sequence]) -> Sampled:
        """Draw for each sequence from its row of `logits`.

        `logits`: (sequences, vocab) float32, overwritten.
        """
        rows = self._rows(sequences)
        if self._is_plain[rows].all():
            return Sampled(_to_list(*self._most_likely(logits)), None)
        wants_logprobs = np.flatnonzero(self._num_logprobs[rows])
        raw = logits[_index(wants_logprobs, logits)] if wants_logprobs.size else None
        penalized = np.flatnonzero(self._has_penalties[rows]).tolist()
        if penalized:
            apply_penalties(logits, {i: sequences[i] for i in penalized})
        for i in np.flatnonzero(self._needs_mask[rows]).tolist():
            mask_early_stops(logits[i], sequences[i])
        chosen, best = self._choose(logits, rows, sequences)
        if raw is None:
            return Sampled(_to_list(chosen, best), None)
        found = self._logprobs(raw, chosen[_index(wants_logprobs, logits)], rows[wants_logprobs])
        logprobs: list[RawLogprob | None] = [None] * len(sequences)
        for i, logprob in zip(wants_logprobs.tolist(), found, strict=True):
            logprobs[i] = logprob
        return Sampled(_to_list(chosen, best), logprobs)

    def _rows(self, sequences: Seq[Sequence]) -> npt.NDArray[np.intp]:
        rows = np.array([sequence.row for sequence in sequences], np.intp)
        owners = self._owners
        for row, sequence in zip(rows.tolist(), sequences, strict=True):
            if owners[row] is not sequence:
                self._take_row(row, sequence)
        return rows

    def _take_row(self, row: int, sequence: Sequence) -> None:
        params = sequence.params
        self._owners[row] = sequence
        self._seeds[row] = sequence.seed
        self._temperature[row] = params.temperature
        self._top_k[row] = min(params.top_k or self._vocab_size, self._vocab_size)
        self._top_p[row] = params.top_p
        self._min_p[row] = params.min_p
        self._num_logprobs[row] = 0 if params.logprobs is None else params.logprobs + 1
        self._needs_mask[row] = params.min_tokens > 0
        self._has_penalties[row] = sequence.token_counts is not None
        self._is_plain[row] = (
            params.greedy
            and params.logprobs is None
            and params.min_tokens == 0
            and sequence.token_counts is None
        )

    def _choose(
        self, logits: Tensor, rows: npt.NDArray[np.intp], sequences: Seq[Sequence]
    ) -> tuple[Tensor, Tensor]:
        """The token of each row, and the row's highest logit."""
        drawn = np.flatnonzero(self._temperature[rows])
        if not drawn.size:
            return self._most_likely(logits)
        positions = np.array([sequences[i].num_generated for i in drawn.tolist()], np.uint64)
        if drawn.size == len(sequences):
            return self._draw(logits, rows, positions)
        chosen, best = self._most_likely(logits)
        where = _index(drawn, logits)
        chosen[where] = self._draw(logits[where], rows[drawn], positions)[0]
        return chosen, best

    def _draw(
        self, logits: Tensor, rows: npt.NDArray[np.intp], positions: npt.NDArray[np.uint64]
    ) -> tuple[Tensor, Tensor]:
        def parameter(table: npt.NDArray[np.generic]) -> Tensor:
            return torch.from_numpy(table[rows]).to(logits.device)

        temperature = parameter(self._temperature).clamp_(min=_MIN_TEMPERATURE)
        shares = torch.from_numpy(uniforms(self._seeds[rows], positions))
        if self._uses_kernels(logits):
            return sampling_kernel.draw(
                logits,
                temperature,
                parameter(self._top_k),
                parameter(self._top_p),
                parameter(self._min_p),
                shares,
            )
        best = logits.amax(1)
        scores = logits.sub_(best.unsqueeze(1)).div_(temperature.unsqueeze(1))
        unfiltered = (
            (self._top_k[rows] == self._vocab_size)
            & (self._top_p[rows] == 1.0)
            & (self._min_p[rows] == 0.0)
        )
        if not unfiltered.all():
            thresholds = filter_thresholds(
                scores, parameter(self._top_k), parameter(self._top_p), parameter(self._min_p)
            )
            scores.masked_fill_(scores < thresholds.unsqueeze(1), -torch.inf)
        return draw(scores, shares.to(logits.device)), best

    def _most_likely(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The first token with the highest logit of each row, and that logit."""
        if self._uses_kernels(logits):
            return argmax_kernel.argmax(logits)
        if logits.device.type == "cpu":
            # numpy takes a tenth of the time of torch's argmax. To both, NaN is the highest.
            chosen = torch.from_numpy(logits.numpy().argmax(1))
        else:
            chosen = logits.argmax(1)
        return chosen, logits.gather(1, chosen.unsqueeze(1)).squeeze(1)

    def _uses_kernels(self, logits: Tensor) -> bool:
        return self._use_kernels and logits.device.type == "cpu" and logits.is_contiguous()

    def _logprobs(
        self, raw: Tensor, chosen: Tensor, rows: npt.NDArray[np.intp]
    ) -> list[RawLogprob]:
        logprobs = raw.log_softmax(1)
        own = logprobs.gather(1, chosen.unsqueeze(1)).squeeze(1).tolist()
        counts = self._num_logprobs[rows] - 1
        best = logprobs.topk(min(int(counts.max()), self._vocab_size), dim=1)
        values, ids = best.values.tolist(), best.indices.tolist()
        return [
            RawLogprob(token_id, logprob, token_ids(ids[i][:count]), tuple(values[i][:count]))
            for i, (token_id, logprob, count) in enumerate(
                zip(chosen.tolist(), own, counts.tolist(), strict=True)
            )
        ]


def _to_list(chosen: Tensor, best: Tensor) -> list[int | None]:
    """The tokens, None where the row's highest logit is not finite."""
    # In one transfer from the device: a second one would wait for it a second time.
    marked: list[int | None] = torch.where(best.isfinite(), chosen, _NO_TOKEN).tolist()
    if _NO_TOKEN in marked:
        return [None if token_id == _NO_TOKEN else token_id for token_id in marked]
    return marked


def _index(positions: npt.NDArray[np.intp], like: Tensor) -> Tensor:
    return torch.from_numpy(positions).to(like.device)
