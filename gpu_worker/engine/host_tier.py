"""When a preempted sequence's blocks go to host memory, and to which of its slots.

A preempted sequence loses the blocks that nobody else holds, and must either compute them again or
have them copied to host memory and back. Both costs are measured here, on this machine and model:

    recompute   tokens to compute again x seconds per token of the recent steps that were mostly
                prompts (a decode step says little: what it costs hardly depends on its tokens)
    copy        blocks x 2 x seconds per block, which the ranks measured once

Pure policy: it sees counts and slot numbers. The copies are in each step's plan, for all ranks.
"""

from __future__ import annotations

_SMOOTHING = 0.2


class HostTier:
    """The slots of host memory, a block each, and the choice whether to use them."""

    def __init__(self, num_slots: int, copy_s_per_block: float) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._copy_s_per_block = copy_s_per_block
        self._compute_s_per_token: float | None = None

    @property
    def num_free(self) -> int:
        """How many slots hold nothing."""
        return len(self._free)

    def observe(self, num_tokens: int, num_seqs: int, step_s: float) -> None:
        """A step of `num_tokens` tokens of `num_seqs` sequences took `step_s`."""
        if num_tokens < 2 * num_seqs:
            return
        measured_s = step_s / num_tokens
        known_s = self._compute_s_per_token
        if known_s is not None:
            measured_s = known_s + _SMOOTHING * (measured_s - known_s)
        self._compute_s_per_token = measured_s

    def take(self, num_blocks: int, num_tokens: int) -> list[int] | None:
        """Slots for `num_blocks` blocks, if copying them is the cheaper way and there is room.

        `num_tokens` are the tokens that would have to be computed again without them.
        """
        if not num_blocks or num_blocks > len(self._free) or self._compute_s_per_token is None:
            return None
        copy_s = 2 * num_blocks * self._copy_s_per_block
        if copy_s >= num_tokens * self._compute_s_per_token:
            return None
        return [self._free.pop() for _ in range(num_blocks)]

    def give_back(self, slots: list[int]) -> None:
        """These slots hold nothing any more that anybody needs."""
        self._free += slots
