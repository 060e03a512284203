"""A request inside the engine: its tokens, the blocks that it holds, how far it is computed."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from cache.prefix_hash import PrefixHasher
from wire.ids import BlockHash, RequestId, TokenIds
from wire.messages import Assignment, FinishReason
from wire.sampling import SamplingParams


class End(NamedTuple):
    """Why a sequence is finished, and the token that ended it if one did."""

    reason: FinishReason
    stop_token_id: int | None


class TokenCounts:
    """How often each token that penalties care about was generated.

    `token_ids[i]` was generated `counts[i]` times; 0 stands for one that is only in the prompt.
    """

    def __init__(self, prompt: Iterable[int]) -> None:
        self.token_ids = array("I", dict.fromkeys(prompt))
        self.counts = array("I", bytes(4 * len(self.token_ids)))
        self._index = {token_id: i for i, token_id in enumerate(self.token_ids)}

    def add(self, token_id: int) -> None:
        """Count one more generated token."""
        i = self._index.get(token_id)
        if i is None:
            self._index[token_id] = len(self.token_ids)
            self.token_ids.append(token_id)
            self.counts.append(1)
        else:
            self.counts[i] += 1


@dataclass(slots=True, eq=False)
class Sequence:
    """The state of one request.

    `index` is its number in the engine: sequences that came later have higher ones. `token_ids` are
    the prompt and what was generated so far. The keys and values of the first `num_computed` of
    them are in the blocks of `block_table`, of which `num_cached_tokens` did not have to be
    computed when the sequence was first admitted. `row` is its place in the engine's per-sequence
    tables while it runs. `max_num_tokens` is the length at which it ends. `is_known` says whether
    an output has told its index.
    """

    index: int
    assignment: Assignment
    seed: int
    stop_token_ids: frozenset[int]
    max_num_tokens: int
    hasher: PrefixHasher
    token_ids: TokenIds = field(init=False)
    num_prompt_tokens: int = field(init=False)
    token_counts: TokenCounts | None = field(init=False)
    num_computed: int = 0
    num_cached_tokens: int | None = None
    block_table: array[int] = field(default_factory=lambda: array("i"))
    block_table_changed: bool = False
    block_hashes: list[BlockHash] = field(default_factory=list)
    row: int | None = None
    is_known: bool = False

    def __post_init__(self) -> None:
        prompt, generated = self.assignment.prompt_token_ids, self.assignment.generated
        self.token_ids = prompt + generated
        self.num_prompt_tokens = len(prompt)
        self.token_counts = TokenCounts(prompt) if _has_penalties(self.params) else None
        if self.token_counts is not None:
            for token_id in generated:
                self.token_counts.add(token_id)

    @property
    def request_id(self) -> RequestId:
        """The id of the request that this is."""
        return self.assignment.request_id

    @property
    def params(self) -> SamplingParams:
        """How its tokens are drawn."""
        return self.assignment.sampling

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens together."""
        return len(self.token_ids)

    @property
    def num_generated(self) -> int:
        """Tokens generated so far, those of earlier attempts included."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed(self) -> int:
        """Tokens that the model must still see before the next one can be drawn."""
        return len(self.token_ids) - self.num_computed

    def append(self, token_id: int) -> None:
        """Take in the next generated token."""
        self.token_ids.append(token_id)
        if self.token_counts is not None:
            self.token_counts.add(token_id)

    def end(self) -> End | None:
        """Whether the tokens so far finish the sequence."""
        last = self.token_ids[-1]
        if last in self.stop_token_ids and self.num_generated > self.params.min_tokens:
            return End("stop", last)
        if len(self.token_ids) >= self.max_num_tokens:
            return End("length", None)
        return None

    def hash_full_blocks(self, block_size: int) -> None:
        """Bring `block_hashes` up to the last block that the known tokens fill."""
        start = len(self.block_hashes)
        if self.num_tokens // block_size > start:
            parent = self.block_hashes[-1] if start else None
            unhashed = self.token_ids[start * block_size :]
            self.block_hashes += self.hasher.hash_blocks(unhashed, parent)


def _has_penalties(params: SamplingParams) -> bool:
    return (
        params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
        or params.repetition_penalty != 1.0
    )
