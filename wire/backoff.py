"""How long to wait between tries while something is away."""

from __future__ import annotations

import random
from collections.abc import Iterator

FIRST_DELAY_S = 0.05
MAX_DELAY_S = 2.0


def retry_delays(first_s: float = FIRST_DELAY_S, max_s: float = MAX_DELAY_S) -> Iterator[float]:
    """How long to wait before each next try: twice as long as before, up to a bound.

    Each is shortened by a random part, so that those who lost the server at the same moment do
    not all come back at the same moment.
    """
    while True:
        yield first_s * random.uniform(0.5, 1.0)
        first_s = min(2 * first_s, max_s)
