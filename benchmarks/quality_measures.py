"""How far one model's scores are from another's: sums that grow as logits come by."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import kl_div


@dataclass(slots=True)
class LogitComparison:
    """Sums over positions at which a reference and a candidate scored the same next token.

    Nothing is kept of the logits themselves, so any number of positions can be added.
    """

    num_positions: int = 0
    num_same_top: int = 0
    sum_kl: float = 0.0
    num_scored: int = 0
    sum_reference_loss: float = 0.0
    sum_candidate_loss: float = 0.0

    def add(self, reference: Tensor, candidate: Tensor, next_tokens: Tensor | None) -> None:
        """Logits (positions, vocabulary) of both.

        `next_tokens` (n,) are what the text has after the first n positions, or None where it is
        not known; perplexity counts those alone.
        """
        expected, got = reference.float().log_softmax(1), candidate.float().log_softmax(1)
        self.num_positions += len(expected)
        self.num_same_top += int((expected.argmax(1) == got.argmax(1)).sum())
        self.sum_kl += float(kl_div(got, expected, reduction="sum", log_target=True))
        if next_tokens is not None:
            columns = next_tokens.long()[:, None]
            self.num_scored += len(columns)
            self.sum_reference_loss -= float(expected[: len(columns)].gather(1, columns).sum())
            self.sum_candidate_loss -= float(got[: len(columns)].gather(1, columns).sum())

    @property
    def mean_kl(self) -> float:
        """KL(reference || candidate) in nats per position."""
        return self.sum_kl / self.num_positions

    @property
    def top_agreement(self) -> float:
        """The share of positions at which both like the same token best."""
        return self.num_same_top / self.num_positions

    @property
    def reference_perplexity(self) -> float:
        """Over the positions whose next token is known."""
        return math.exp(self.sum_reference_loss / self.num_scored)

    @property
    def candidate_perplexity(self) -> float:
        """Over the positions whose next token is known."""
        return math.exp(self.sum_candidate_loss / self.num_scored)

    @property
    def perplexity_change(self) -> float:
        """The candidate's perplexity over the reference's, less 1: positive is worse."""
        return math.expm1((self.sum_candidate_loss - self.sum_reference_loss) / self.num_scored)
