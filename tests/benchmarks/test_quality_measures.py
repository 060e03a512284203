"""The arithmetic behind `benchmarks.quality`, against figures worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.quality import passes
from benchmarks.quality_measures import LogitComparison
from benchmarks.teacher_forcing import Chunk, plan_step


def logits(*rows: tuple[float, ...]) -> torch.Tensor:
    """Logits whose softmax is `rows`, shifted by a constant, which must not matter."""
    return torch.tensor(rows).log() + 3.0


def test_perplexity_counts_the_text_of_both_models() -> None:
    sums = LogitComparison()
    sums.add(
        logits((0.5, 0.25, 0.25), (0.25, 0.5, 0.25)),
        logits((0.25, 0.5, 0.25), (0.25, 0.25, 0.5)),
        torch.tensor([0, 1]),
    )
    assert sums.reference_perplexity == pytest.approx(2.0)
    assert sums.candidate_perplexity == pytest.approx(4.0)
    assert sums.perplexity_change == pytest.approx(1.0)


def test_divergence_is_the_candidates_from_the_reference() -> None:
    sums = LogitComparison()
    sums.add(logits((0.5, 0.5)), logits((0.75, 0.25)), None)
    expected = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert sums.mean_kl == pytest.approx(expected, rel=1e-5)


def test_equal_distributions_do_not_diverge_whatever_their_scale() -> None:
    sums = LogitComparison()
    sums.add(logits((0.1, 0.9)), logits((0.1, 0.9)) - 7.0, torch.tensor([1]))
    assert sums.mean_kl == pytest.approx(0.0, abs=1e-6)
    assert sums.perplexity_change == pytest.approx(0.0, abs=1e-6)
    assert sums.top_agreement == 1.0


def test_positions_add_up_over_chunks_and_the_last_one_has_no_next_token() -> None:
    reference = logits((0.5, 0.5), (0.2, 0.8), (0.9, 0.1))
    candidate = logits((0.4, 0.6), (0.3, 0.7), (0.6, 0.4))
    whole, parts = LogitComparison(), LogitComparison()
    whole.add(reference, candidate, torch.tensor([0, 1]))
    parts.add(reference[:1], candidate[:1], torch.tensor([0]))
    parts.add(reference[1:], candidate[1:], torch.tensor([1]))
    assert (parts.num_positions, parts.num_scored) == (whole.num_positions, whole.num_scored)
    assert (whole.num_positions, whole.num_scored) == (3, 2)
    assert parts.mean_kl == pytest.approx(whole.mean_kl)
    assert parts.candidate_perplexity == pytest.approx(whole.candidate_perplexity)
    assert whole.top_agreement == pytest.approx(2 / 3)


def test_a_step_of_two_sequences_keeps_them_in_blocks_of_their_own() -> None:
    chunks = [Chunk([7, 8, 9], 0, first_block=0), Chunk([5], 6, first_block=4)]
    plan = plan_step(chunks, 4, every_row=False)
    assert plan.positions.tolist() == [0, 1, 2, 6]
    assert plan.slot_mapping.tolist() == [0, 1, 2, 22]
    assert plan.query_starts.tolist() == [0, 3, 4]
    assert plan.context_lens.tolist() == [3, 7]
    assert plan.block_tables.tolist() == [[0, 0], [4, 5]]
    assert plan.logits_rows.tolist() == [2, 3]


@pytest.mark.parametrize(
    ("change", "first_tokens", "passed"),
    [
        (0.009, (0.95, 1.0), True),
        (-0.009, (0.95, 1.0), True),
        (0.011, (1.0, 1.0), False),
        (0.0, (1.0, 0.94), False),
    ],
)
def test_the_gate_takes_every_seed_and_either_direction_of_perplexity(
    change: float, first_tokens: tuple[float, ...], passed: bool
) -> None:
    report = {
        "text": {"perplexity_change": change},
        "prompts": [{"first_token": share} for share in first_tokens],
    }
    assert passes(report) is passed
