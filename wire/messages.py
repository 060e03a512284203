"""The messages: what producers, schedulers, worker groups and consumers say to each other.

Every message is a frozen dataclass; `wire.codec` turns it into msgpack and back, strictly.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from wire.errors import InvalidRequest
from wire.ids import GroupId, RequestId, TokenIds, token_ids
from wire.sampling import SamplingParams

Priority: TypeAlias = Literal["interactive", "standard", "batch"]
PRIORITIES: tuple[Priority, ...] = ("interactive", "standard", "batch")

FinishReason: TypeAlias = Literal["stop", "length"]
TerminalState: TypeAlias = Literal["done", "failed", "cancelled", "expired"]
RequestState: TypeAlias = Literal[
    "queued", "delayed", "assigned", "done", "failed", "cancelled", "expired"
]
CommitState: TypeAlias = TerminalState | Literal["retry"]
"""What a group says of a request that it holds no more; "retry": another attempt may do better."""

DEFAULT_TENANT = "default"


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation, as the chat template sees it."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model is to continue: exactly one of the three is set."""

    text: str | None = None
    token_ids: TokenIds | None = None
    messages: tuple[ChatMessage, ...] | None = None

    def __post_init__(self) -> None:
        """Raise InvalidRequest unless exactly one is set."""
        given = [part for part in (self.text, self.token_ids, self.messages) if part is not None]
        if len(given) != 1:
            raise InvalidRequest(
                f"a prompt is one of text, token ids and messages; {len(given)} of them are set",
                field="prompt",
            )


@dataclass(frozen=True, slots=True)
class Request:
    """What a producer submits.

    `model` None takes whatever model the fleet serves, if it serves just one. `stream` asks for
    tokens as they come rather than a block at a time. `timeout_s` counts from the submission,
    on the server's clock.
    """

    request_id: RequestId
    prompt: Prompt
    sampling: SamplingParams = field(default_factory=SamplingParams)
    model: str | None = None
    priority: Priority = "standard"
    tenant: str = DEFAULT_TENANT
    stream: bool = False
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """An alternative at one position: its id, its text, and its natural log probability."""

    token_id: int
    token: str
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The chosen token's log probability and those of the most likely ones, best first."""

    token_id: int
    token: str
    logprob: float
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class PrefixSource:
    """Another group that has the first `num_blocks` blocks of a prompt cached.

    They can be fetched at its address, if it still has them: this was known a moment ago.
    """

    group_id: GroupId
    epoch: int
    num_blocks: int
    transfer_address: str


@dataclass(frozen=True, slots=True)
class Assignment:
    """One request on its way to a worker group, tokenized, under a fencing token.

    `generated` holds the tokens that an earlier attempt journaled: they are prefilled with the
    prompt and count as output (towards `max_tokens`, penalties and random-number positions);
    `generated_text` and `generated_logprobs` are what went out with them.
    `cache_salt` separates tenants in the prefix cache. `deadline_ms` is server time.
    `prefix_source` is where more of the prompt is cached than in the group that this goes to.
    """

    request_id: RequestId
    fence: int
    prompt_token_ids: TokenIds
    sampling: SamplingParams
    stream: bool
    cache_salt: bytes = b""
    deadline_ms: int | None = None
    generated: TokenIds = field(default_factory=token_ids)
    generated_text: str = ""
    generated_logprobs: tuple[TokenLogprob, ...] | None = None
    prefix_source: PrefixSource | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one request, in order: `offset` is the index of the first one in the output.

    `text_offset` is how many characters of text came with the tokens before. The two let a reader
    drop what it already has.
    """

    fence: int
    offset: int
    token_ids: TokenIds
    text: str
    text_offset: int
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """Why a request failed: `code` for programs, `message` for people, `field` if one is wrong."""

    code: str
    message: str
    field: str | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """The one terminal result of a request.

    `text` and `token_ids` hold what was generated, also when the request was cancelled or
    expired half way. `finish_reason` is set when `state` is "done", `error` when it is "failed".
    `stop_reason` is the stop string or stop token id that ended it, if one did. Times are
    milliseconds of the server's clock.
    """

    request_id: RequestId
    state: TerminalState
    model: str | None = None
    text: str = ""
    token_ids: TokenIds = field(default_factory=token_ids)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] | None = None
    error: ErrorInfo | None = None
    submitted_ms: int = 0
    finished_ms: int = 0


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What the rest of the fleet must know of a model, published by the groups that serve it.

    `tokenizer_json` is in the `tokenizers` library's format. `max_model_len` is in tokens,
    prompt and output together. `block_size` is in tokens.
    """

    name: str
    tokenizer_json: bytes
    chat_template: str | None
    bos_token: str | None
    eos_token: str | None
    bos_token_id: int | None
    add_bos_token: bool
    vocab_size: int
    max_model_len: int
    block_size: int


@dataclass(frozen=True, slots=True)
class GroupStatus:
    """A worker group's heartbeat: what it is, what it can take, how it is doing.

    `credits` is how many requests the group accepts at a time, running and waiting together.
    `cache_format` names what its cached blocks are made of, down to the bytes: their hashes are
    computed with it. `transfer_address` is where others fetch blocks from it, None if they cannot.
    """

    group_id: GroupId
    epoch: int
    model: str
    tensor_parallel_size: int
    credits: int
    state: Literal["healthy", "draining"]
    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    cache_format: str = ""
    transfer_address: str | None = None
