"""From tokens to text: what a reader gets, and when."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from gpu_worker.engine.stub import stub_model_card
from gpu_worker.output import RequestOutput
from gpu_worker.rank_protocol import RawLogprob, SequenceOutput
from gpu_worker.text import TextDecoder
from wire.ids import RequestId, TokenIds, token_ids
from wire.messages import Assignment, Chunk, FinishReason, Result, TokenLogprob
from wire.records import Journaled, JournalEntry
from wire.sampling import SamplingParams

CARD = stub_model_card()
DECODER = TextDecoder(CARD.tokenizer_json)
TOKENIZER = Tokenizer.from_buffer(CARD.tokenizer_json)
END = 0
"""The end-of-sequence token; every other token is one byte."""


def ids(text: str) -> list[int]:
    found: list[int] = TOKENIZER.encode(text).ids
    return found


@dataclass
class Engine:
    """Feeds a request's output as an engine would, and takes chunks as the ledger would."""

    sampling: SamplingParams = field(default_factory=SamplingParams)
    prompt: TokenIds = field(default_factory=lambda: token_ids(ids("prompt ")))
    journaled: Journaled = field(default_factory=Journaled)
    fence: int = 1

    def __post_init__(self) -> None:
        self.output = RequestOutput(
            Assignment(
                RequestId("r"),
                self.fence,
                self.prompt,
                self.sampling,
                stream=True,
                generated=self.journaled.token_ids,
                generated_text=self.journaled.text,
                generated_logprobs=self.journaled.logprobs,
            ),
            DECODER,
        )
        self.chunks: list[Chunk] = []
        self.stopped = False

    def say(
        self, *tokens: int, end: FinishReason | None = None, stop_token_id: int | None = None
    ) -> None:
        """One step, and the chunk that it gives."""
        wanted = self.sampling.logprobs is not None
        logprobs = tuple(RawLogprob(t, -float(t), token_ids([t, 1]), (-1.0, -2.0)) for t in tokens)
        self.stopped = self.output.add(
            SequenceOutput(
                RequestId("r"),
                self.fence,
                token_ids(tokens),
                logprobs if wanted else None,
                end,
                stop_token_id,
            )
        )
        chunk = self.output.take_chunk(ended=self.output.state is not None)
        if chunk is not None:
            self.chunks.append(chunk)

    def spell(self, text: str, end: FinishReason | None = None) -> None:
        """One step for each byte, as long as no stop string ends it."""
        tokens = ids(text)
        for i, token in enumerate(tokens):
            if self.output.state is None:
                self.say(token, end=end if i == len(tokens) - 1 else None)

    @property
    def sent(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def result(self) -> Result:
        assert self.output.state is not None
        return self.output.result(self.output.state, "m")


def test_text_comes_with_its_tokens() -> None:
    engine = Engine()
    engine.spell("Hello", end="length")
    assert [chunk.text for chunk in engine.chunks] == list("Hello")
    assert [chunk.offset for chunk in engine.chunks] == [0, 1, 2, 3, 4]
    assert (engine.result.text, engine.result.finish_reason) == ("Hello", "length")
    assert engine.result.num_prompt_tokens == 7


def test_nothing_new_is_no_chunk() -> None:
    engine = Engine()
    engine.say(*ids("ab"))
    engine.say()
    assert len(engine.chunks) == 1


# Stop strings


def test_a_stop_string_ends_the_text_and_is_not_part_of_it() -> None:
    engine = Engine(SamplingParams(stop=("END",)))
    engine.spell("text END and more")
    assert engine.stopped, "the engine must be told"
    assert engine.result.text == engine.sent == "text "
    assert (engine.result.finish_reason, engine.result.stop_reason) == ("stop", "END")
    assert len(engine.result.token_ids) == len("text END"), "its tokens count as generated"


def test_what_may_become_a_stop_string_is_held_back_until_it_is_none() -> None:
    engine = Engine(SamplingParams(stop=("END",)))
    seen = []
    for char in "a EN ENE END":
        engine.spell(char)
        seen.append(engine.sent)
    assert seen[:4] == ["a", "a ", "a ", "a "]
    assert seen[4] == "a EN "
    assert engine.sent == "a EN ENE "


def test_held_back_text_goes_out_at_the_end() -> None:
    engine = Engine(SamplingParams(stop=("END",)))
    engine.spell("the EN")
    assert engine.sent == "the "
    engine.say(END, end="stop", stop_token_id=END)
    assert engine.sent == engine.result.text == "the EN"
    assert engine.result.stop_reason is None


def test_a_stop_string_may_span_steps_and_lie_within_one() -> None:
    engine = Engine(SamplingParams(stop=("\n\n",)))
    engine.say(*ids("one\n"))
    engine.say(*ids("\ntwo"))
    assert engine.result.text == engine.sent == "one"
    assert list(engine.result.token_ids) == ids("one\n\n"), "what came after it is dropped"


def test_the_first_of_several_stop_strings_counts() -> None:
    engine = Engine(SamplingParams(stop=("lo", "Hell", "zzz")))
    engine.spell("Hello")
    assert (engine.result.text, engine.result.stop_reason) == ("", "Hell")


def test_the_engines_own_end_in_the_same_step_needs_no_abort() -> None:
    engine = Engine(SamplingParams(stop=("x",)))
    engine.say(*ids("x"), end="length")
    assert not engine.stopped
    assert engine.result.finish_reason == "stop"


def test_stop_strings_do_not_count_before_min_tokens() -> None:
    engine = Engine(SamplingParams(stop=("ab", "longer stop"), min_tokens=4))
    engine.spell("xabc")
    assert engine.output.state is None
    engine.spell("def")
    assert engine.output.state is None, "nor is one from before found later on"
    engine.spell("gab")
    assert engine.result.text == engine.sent == "xabcdefg"


@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(0, 6),
    st.integers(0, 2**32),
)
def test_nothing_that_is_sent_is_ever_taken_back(
    text: str, stop: list[str], min_tokens: int, seed: int
) -> None:
    """However the steps are cut, the chunks make up the result's text, and it has no stop."""
    choose = random.Random(seed)
    engine = Engine(SamplingParams(stop=tuple(stop), min_tokens=min_tokens))
    rest = ids(text)
    while rest and engine.output.state is None:
        size = choose.randint(1, 4)
        engine.say(*rest[:size])
        rest = rest[size:]
    if engine.output.state is None:
        engine.say(END, end="stop", stop_token_id=END)
    assert engine.sent == engine.result.text
    ends = [
        text.find(one, max(0, min_tokens - len(one) + 1)) + len(one)
        for one in stop
        if text.find(one, max(0, min_tokens - len(one) + 1)) >= 0
    ]
    assert len(engine.result.token_ids) == (min(ends) if ends else len(text) + 1)


# Stop tokens


def test_a_stop_token_is_generated_and_not_spoken() -> None:
    [bang] = ids("!")
    engine = Engine(SamplingParams(stop_token_ids=(bang,)))
    engine.say(*ids("Hi"))
    engine.say(bang, end="stop", stop_token_id=bang)
    result = engine.result
    assert (result.text, result.stop_reason, result.finish_reason) == ("Hi", bang, "stop")
    assert list(result.token_ids) == ids("Hi!")
    assert engine.sent == "Hi"


def test_the_end_of_sequence_is_no_stop_reason() -> None:
    engine = Engine()
    engine.say(*ids("Hi"), END, end="stop", stop_token_id=END)
    assert (engine.result.text, engine.result.stop_reason) == ("Hi", None)
    assert engine.result.token_ids[-1] == END


# Characters of several bytes


def test_a_character_comes_when_its_last_byte_does() -> None:
    engine = Engine()
    engine.spell("a€🙂b")
    assert [chunk.text for chunk in engine.chunks] == ["a", "", "", "€", "", "", "", "🙂", "b"]


def test_a_stop_string_of_several_bytes_is_found() -> None:
    engine = Engine(SamplingParams(stop=("🙂",)))
    engine.spell("ü🙂x")
    assert engine.result.text == engine.sent == "ü"


def test_half_a_character_at_the_prompts_end_does_not_let_the_prompt_out() -> None:
    engine = Engine(prompt=token_ids([*ids("secret "), ids("€")[0]]))
    engine.spell("hello", end="length")
    assert engine.sent == engine.result.text
    assert engine.sent.endswith("hello")
    assert "secret" not in engine.sent


def byte_fallback_decoder() -> TextDecoder:
    """A tokenizer of the SentencePiece kind: unknown characters are tokens of one byte each."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocab |= {"▁": 256, "a": 257, "b": 258}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return TextDecoder(tokenizer.to_str().encode())


@pytest.mark.parametrize(
    "tokens", [[0x61, 0xE2, 258, 257], [0xE2, 0x61, 0xE2, 0x61, 258], [0xFF, 257, 0xFF, 257]]
)
def test_bytes_that_are_no_character_do_no_harm(tokens: Sequence[int]) -> None:
    stream = byte_fallback_decoder().stream(token_ids([257]))
    text = "".join(stream.step(token) for token in [*tokens, 258, 258])
    assert text.endswith("bb")


@given(st.lists(st.integers(0, 258), max_size=30), st.lists(st.integers(0, 258), max_size=8))
def test_any_tokens_can_be_decoded(tokens: list[int], context: list[int]) -> None:
    stream = byte_fallback_decoder().stream(token_ids(context))
    text = "".join(stream.step(token) for token in [*tokens, 257, 258, 258])
    assert text.endswith("bb")


@given(st.lists(st.integers(0, 258), max_size=40), st.integers(0, 2**32))
def test_however_tokens_are_cut_their_text_is_the_same(tokens: list[int], seed: int) -> None:
    choose = random.Random(seed)
    for decoder, context in ((byte_fallback_decoder(), [257]), (DECODER, ids("a "))):
        known = [token % 257 for token in tokens]
        one_by_one, by_pieces = (
            decoder.stream(token_ids(context)),
            decoder.stream(token_ids(context)),
        )
        expected = "".join(one_by_one.step(token) for token in known)
        pieces, rest = "", token_ids(known)
        while rest:
            size = choose.randint(1, 20)
            pieces += by_pieces.take(rest[:size])
            rest = rest[size:]
        assert pieces == expected


@given(st.text(max_size=12), st.text(max_size=6))
def test_chunks_of_any_text_add_up_to_it(text: str, prompt: str) -> None:
    engine = Engine(prompt=token_ids(ids(prompt) or [1]))
    engine.spell(text.replace("\N{REPLACEMENT CHARACTER}", ""))
    assert engine.sent == text.replace("\N{REPLACEMENT CHARACTER}", "")


# Log probabilities


def test_logprobs_have_the_text_of_each_token() -> None:
    engine = Engine(SamplingParams(logprobs=2))
    engine.say(*ids("a"))
    engine.say(END, end="stop", stop_token_id=END)
    [chosen, end] = engine.result.logprobs or ()
    assert (chosen.token, chosen.logprob) == ("a", -float(ids("a")[0]))
    assert [(top.token, top.logprob) for top in chosen.top] == [("a", -1.0), ("!", -2.0)]
    assert (end.token_id, end.token) == (END, "<|end|>")
    assert [chunk.logprobs for chunk in engine.chunks] == [(chosen,), (end,)]


# Going on after another group


@pytest.mark.parametrize("cut", range(1, 15))
def test_a_resumed_request_ends_up_as_an_undisturbed_one(cut: int) -> None:
    """Text, tokens, log probabilities and chunks, wherever the first attempt was cut off."""
    text = "a€ EN 🙂END x"
    sampling = SamplingParams(stop=("END",), min_tokens=3, logprobs=1)
    whole = Engine(sampling)
    whole.spell(text)

    first = Engine(sampling)
    for token in ids(text)[:cut]:
        if first.output.state is None:
            first.say(token)
    if first.output.state is not None:
        return
    journaled = Journaled.of(JournalEntry(b"1-0", chunk, None) for chunk in first.chunks)
    second = Engine(sampling, journaled=journaled, fence=3)
    assert second.output.take_chunk(ended=False) is None, "nothing is sent twice"
    for token in ids(text)[cut:]:
        if second.output.state is None:
            second.say(token)

    assert second.result == whole.result
    assert first.sent + second.sent == whole.sent
    assert [chunk.offset for chunk in second.chunks][:1] == [cut]
    logprobs: list[TokenLogprob] = []
    for chunk in first.chunks + second.chunks:
        logprobs += chunk.logprobs or ()
    assert tuple(logprobs) == whole.result.logprobs
