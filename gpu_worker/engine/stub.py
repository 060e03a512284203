"""An engine without a model, for tests of everything around the engine; loads no torch.

It answers every prompt with the prompt itself and then the end of sequence, a token per step for
each running request, and keeps to `max_tokens`, `min_tokens`, `ignore_eos` and stop tokens as the
real engine does. Its tokenizer has one token for each byte.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gpu_worker.layer_progress import LayerCounter
from gpu_worker.rank_options import RankOptions
from gpu_worker.rank_protocol import EngineStats, SequenceOutput, StepOutput
from wire.ids import RequestId, TokenIds, token_ids
from wire.messages import Assignment, ErrorInfo, FinishReason, ModelCard

STUB_MAX_MODEL_LEN = 2048
_EOS_TOKEN = "<|end|>"
_EOS_TOKEN_ID = 0
_VOCAB_SIZE = 257
_FILLER_TOKEN_ID = 1
_NUM_LAYERS = 10
_CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def stub_model_card(
    *, name: str = "stub", block_size: int = 16, max_model_len: int | None = None
) -> ModelCard:
    """The card of the model that the stub engine pretends to run."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {_EOS_TOKEN: _EOS_TOKEN_ID} | {char: i for i, char in enumerate(alphabet, start=1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([_EOS_TOKEN])
    return ModelCard(
        name=name,
        tokenizer_json=tokenizer.to_str().encode(),
        chat_template=_CHAT_TEMPLATE,
        bos_token=None,
        eos_token=_EOS_TOKEN,
        bos_token_id=None,
        add_bos_token=False,
        vocab_size=_VOCAB_SIZE,
        max_model_len=max_model_len or STUB_MAX_MODEL_LEN,
        block_size=block_size,
    )


@dataclass(slots=True, eq=False)
class _Echo:
    """One request: what it echoes, and what it has generated so far."""

    assignment: Assignment
    index: int
    answer: list[int]
    generated: TokenIds
    limit: int
    is_known: bool = False  # to the orchestrator, by its index

    def next_token(self) -> int:
        """The prompt, then the end of sequence, or the prompt again where that may not be yet."""
        params, position = self.assignment.sampling, len(self.generated)
        may_end = not params.ignore_eos and position >= params.min_tokens
        if position >= len(self.answer) and may_end:
            return _EOS_TOKEN_ID
        return self.answer[position % len(self.answer)]

    def end(self) -> FinishReason | None:
        """Whether the tokens so far finish the request."""
        params = self.assignment.sampling
        if len(self.generated) > params.min_tokens:
            is_eos = self.generated[-1] == _EOS_TOKEN_ID and not params.ignore_eos
            if is_eos or self.generated[-1] in params.stop_token_ids:
                return "stop"
        return "length" if len(self.generated) >= self.limit else None

    def output(self, num_new: int, reason: FinishReason | None) -> SequenceOutput:
        """What a step gave that generated the last `num_new` tokens."""
        self.is_known = True
        return SequenceOutput(
            request_id=self.assignment.request_id,
            fence=self.assignment.fence,
            token_ids=self.generated[len(self.generated) - num_new :],
            finish_reason=reason,
            stop_token_id=self.generated[-1] if reason == "stop" else None,
            num_prompt_tokens=len(self.assignment.prompt_token_ids),
            index=self.index,
        )


class StubEngine:
    """Has the methods of `Engine`; a step takes `options.stub_step_s`, in ten equal layers."""

    def __init__(self, options: RankOptions, layers: LayerCounter) -> None:
        self.max_model_len = options.max_model_len or STUB_MAX_MODEL_LEN
        self.vocab_size = _VOCAB_SIZE
        self.num_blocks = options.max_num_seqs * -(-self.max_model_len // options.block_size)
        self.cache_format = f"stub/{options.block_size}"
        self._max_num_seqs = options.max_num_seqs
        self._step_s = options.stub_step_s
        self._layers = layers
        self._requests: dict[RequestId, _Echo] = {}  # in order of arrival
        self._ended_early: list[SequenceOutput] = []
        self._num_generated = 0
        self._num_added = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._requests or self._ended_early)

    def add(self, assignment: Assignment) -> None:
        """Queue a request; one that is already here is replaced if the new fence is higher."""
        running = self._requests.get(assignment.request_id)
        if running is not None and running.assignment.fence >= assignment.fence:
            return
        self.abort(assignment.request_id)
        prompt, max_tokens = assignment.prompt_token_ids, assignment.sampling.max_tokens
        room = self.max_model_len - len(prompt)
        if not prompt or room < 1:
            self._ended_early.append(_refusal(assignment))
            return
        self._num_added += 1
        echo = _Echo(
            assignment,
            index=self._num_added,
            answer=[t for t in prompt if t != _EOS_TOKEN_ID] or [_FILLER_TOKEN_ID],
            generated=assignment.generated[:],
            limit=room if max_tokens is None else min(room, max_tokens),
        )
        if (reason := echo.end()) is not None:
            self._ended_early.append(echo.output(0, reason))
        else:
            self._requests[assignment.request_id] = echo

    def abort(self, request_id: RequestId) -> None:
        """Drop a request. Unknown ids are ignored."""
        self._requests.pop(request_id, None)
        self._ended_early = [o for o in self._ended_early if o.request_id != request_id]

    def step(self) -> StepOutput:
        """One token for each of the oldest requests, as many as run at a time."""
        self._compute_layers()
        outputs, self._ended_early = self._ended_early, []
        indices, tokens = token_ids(), token_ids()
        running = list(self._requests.values())[: self._max_num_seqs]
        for echo in running:
            token_id = echo.next_token()
            echo.generated.append(token_id)
            reason = echo.end()
            if reason is not None:
                del self._requests[echo.assignment.request_id]
            if reason is not None or not echo.is_known:
                outputs.append(echo.output(1, reason))
            else:
                indices.append(echo.index)
                tokens.append(token_id)
        self._num_generated += len(running)
        num_running = min(len(self._requests), self._max_num_seqs)
        stats = EngineStats(
            num_running=num_running,
            num_waiting=len(self._requests) - num_running,
            num_blocks=self.num_blocks,
            num_free_blocks=self.num_blocks,
            num_step_tokens=len(running),
            step_s=self._step_s,
            num_generated_tokens_total=self._num_generated,
        )
        return StepOutput(tuple(outputs), stats, indices, tokens)

    def check_integrity(self) -> None:
        """Raise AssertionError unless what runs and waits has something left to say."""
        assert all(echo.end() is None for echo in self._requests.values()), "an end was missed"

    def _compute_layers(self) -> None:
        if not self._step_s:
            time.sleep(0)  # a model would not keep the core for itself either
            return
        for _ in range(_NUM_LAYERS):
            time.sleep(self._step_s / _NUM_LAYERS)
            self._layers.add()


def _refusal(assignment: Assignment) -> SequenceOutput:
    error = ErrorInfo("invalid_request", "the prompt is empty or too long", "prompt")
    return SequenceOutput(assignment.request_id, assignment.fence, error=error)
