"""Which requests the engine refuses, and why."""

from __future__ import annotations

import numpy as np

from wire.errors import InvalidRequest, RequestTooLong
from wire.ids import TokenIds, token_ids
from wire.messages import Assignment


def validate(assignment: Assignment, *, max_model_len: int, vocab_size: int) -> None:
    """Raise InvalidRequest, naming the field, for what the model cannot serve."""
    params, tokens = assignment.sampling, assignment.prompt_token_ids
    if not tokens:
        raise InvalidRequest("the prompt has no tokens", field="prompt")
    if len(tokens) >= max_model_len:
        raise RequestTooLong(
            f"the prompt has {len(tokens)} tokens; at most {max_model_len - 1} leave room for an"
            " answer",
            field="prompt",
        )
    _check_vocabulary("prompt", tokens, vocab_size)
    _check_vocabulary("generated", assignment.generated, vocab_size)
    _check_vocabulary("stop_token_ids", token_ids(params.stop_token_ids), vocab_size)


def _check_vocabulary(field: str, tokens: TokenIds, vocab_size: int) -> None:
    highest = int(np.frombuffer(tokens, np.uint32).max(initial=0))
    if highest >= vocab_size:
        raise InvalidRequest(
            f"token id {highest} in {field} is not in the vocabulary of {vocab_size}", field=field
        )
