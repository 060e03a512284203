"""Drawing a token from what top-k, top-p and min-p leave of a distribution.

All three filters keep the tokens above some score, so each row needs just one threshold, and
nothing is sorted to draw: the draw inverts the cumulative distribution in the order of token ids.
Tokens that tie with the last one kept are kept too, so the outcome does not depend on how a sort
breaks ties, nor on what else is in the batch.

Scores are logits after the temperature, less their row's maximum: (rows, vocab) float32, at most 0.
A token's weight is exp(score); weights are probabilities up to a factor per row.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_NUM_CANDIDATES = 256
_CHUNK = 128


def filter_thresholds(scores: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The lowest score to keep, for each row: (rows,) float32, -inf to keep all.

    `top_k`: (rows,) int64, the vocabulary's size for none; `top_p`: (rows,) float32, 1 for none;
    `min_p`: (rows,) float32, 0 for none. min-p comes first (arXiv 2407.01082: relative to the most
    likely token), then top-k, then top-p (nucleus sampling, arXiv 1904.09751) over what is left.
    """
    thresholds = min_p.log()
    vocab_size = scores.shape[1]
    needs_order = (top_k < vocab_size) | (top_p < 1.0)
    if not needs_order.any():
        return thresholds
    rows = needs_order.nonzero().squeeze(1)
    thresholds[rows] = _ordered_thresholds(
        scores[rows], top_k[rows].clamp(max=vocab_size), top_p[rows], thresholds[rows]
    )
    return thresholds


def _ordered_thresholds(scores: Tensor, top_k: Tensor, top_p: Tensor, floor: Tensor) -> Tensor:
    vocab_size = scores.shape[1]
    limited = top_k < vocab_size
    num_candidates = _NUM_CANDIDATES
    if limited.any():
        num_candidates = max(num_candidates, int(top_k[limited].max()))
    num_candidates = min(num_candidates, vocab_size)
    best = scores.topk(num_candidates).values
    kth = best.gather(1, (top_k - 1).clamp(max=num_candidates - 1).unsqueeze(1)).squeeze(1)
    thresholds = torch.where(limited, torch.maximum(floor, kth), floor)
    nucleus = (top_p < 1.0).nonzero().squeeze(1)
    if nucleus.numel():
        thresholds[nucleus] = _nucleus_thresholds(
            scores[nucleus], best[nucleus], top_p[nucleus], thresholds[nucleus]
        )
    return thresholds


def _nucleus_thresholds(scores: Tensor, best: Tensor, top_p: Tensor, floor: Tensor) -> Tensor:
    """`best`: the highest scores of each row, in order, often enough to hold the nucleus."""
    kept = scores.masked_fill(scores < floor.unsqueeze(1), -torch.inf)
    wanted = top_p.double() * kept.exp().sum(1).double()
    reached = _cumulative_weights(best, floor)
    thresholds = _first_reaching(best, reached, wanted)
    short = (reached[:, -1] < wanted).nonzero().squeeze(1)
    if short.numel() and best.shape[1] < scores.shape[1]:
        ordered = _sorted_descending(scores[short])
        reached = _cumulative_weights(ordered, floor[short])
        thresholds[short] = _first_reaching(ordered, reached, wanted[short])
    return torch.maximum(thresholds, floor)


def _cumulative_weights(ordered: Tensor, floor: Tensor) -> Tensor:
    weights = ordered.masked_fill(ordered < floor.unsqueeze(1), -torch.inf).exp()
    return weights.double().cumsum(1)


def _sorted_descending(scores: Tensor) -> Tensor:
    if scores.device.type != "cpu":
        return scores.sort(descending=True).values
    # torch sorts indices along, which nobody needs here, and takes ten times as long.
    ascending = torch.from_numpy(np.sort(scores.numpy(), axis=1))
    return ascending.flip(1)


def _first_reaching(ordered: Tensor, reached: Tensor, wanted: Tensor) -> Tensor:
    index = (reached < wanted.unsqueeze(1)).sum(1, keepdim=True).clamp(max=ordered.shape[1] - 1)
    return ordered.gather(1, index).squeeze(1)


def draw(scores: Tensor, uniforms: Tensor) -> Tensor:
    """One token id for each row: (rows,) int64.

    `uniforms`: (rows,) float64 strictly between 0 and 1. The token is the one at which the
    cumulative weight first exceeds that share of the total. Two levels find it: first among sums
    over chunks of the vocabulary, then inside one chunk, in place of a cumulative sum over all.
    """
    num_rows, vocab_size = scores.shape
    weights = scores.exp()
    if vocab_size % _CHUNK:
        weights = torch.nn.functional.pad(weights, (0, _CHUNK - vocab_size % _CHUNK))
    chunks = weights.view(num_rows, -1, _CHUNK)
    before = chunks.sum(2).double().cumsum(1)
    target = uniforms * before[:, -1]
    chunk = (before <= target.unsqueeze(1)).sum(1)
    row = torch.arange(num_rows, device=scores.device)
    inside = chunks[row, chunk].double()
    start = before[row, chunk] - chunks[row, chunk].sum(1).double()
    # Rounding may carry the target out of the chunk: before its start, where the first token could
    # be a masked one, or past its end. Its first or its last possible token takes it.
    within = (target - start).clamp(min=0.0)
    offset = (inside.cumsum(1) <= within.unsqueeze(1)).sum(1)
    place = torch.arange(_CHUNK, device=scores.device)
    last = torch.where(inside > 0, place, 0).amax(1)
    return chunk * _CHUNK + torch.minimum(offset, last)
