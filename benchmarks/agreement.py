"""How far greedy outputs agree with a reference's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Outputs = Mapping[str, Sequence[int]]
"""Token ids by custom_id."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Shares from 0 to 1.

    `first_token` of the requests begin with the reference's token; `leading_tokens` of all tokens
    come before the first one that differs in their request (after which the two go their own ways,
    since each continues its own text); `identical` of the requests are equal to the end.
    """

    first_token: float
    leading_tokens: float
    identical: float


def agreement(reference: Outputs, outputs: Outputs) -> Agreement | None:
    """None if the reference knows none of the requests; one that is shorter bounds the comparison.

    A reference of first tokens only has outputs of one token.
    """
    common = [custom_id for custom_id in outputs if reference.get(custom_id)]
    if not common:
        return None
    num_first = num_identical = num_leading = num_tokens = 0
    for custom_id in common:
        expected = reference[custom_id]
        length = min(len(expected), len(outputs[custom_id]))
        pairs = zip(expected, outputs[custom_id], strict=False)
        num_equal = next((i for i, (x, y) in enumerate(pairs) if x != y), length)
        num_first += num_equal > 0
        num_identical += num_equal == length
        num_leading += num_equal
        num_tokens += length
    return Agreement(
        first_token=num_first / len(common),
        leading_tokens=num_leading / num_tokens,
        identical=num_identical / len(common),
    )


def read_reference(directory: Path | None, workload: str) -> Outputs:
    """The outputs in `WORKLOAD.json`, an object of lists by custom_id; empty if there are none."""
    if directory is None:
        return {}
    path = directory / f"{workload}.json"
    outputs: Outputs = json.loads(path.read_text()) if path.exists() else {}
    return outputs
