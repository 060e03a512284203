from __future__ import annotations

import subprocess
import sys

import pytest
from tokenizers import Tokenizer

from gpu_worker.engine.stub import StubEngine, stub_model_card
from gpu_worker.layer_progress import LayerCounter
from gpu_worker.rank_protocol import SequenceOutput
from support.engine_fakes import assignment, rank_options, tokens_of
from support.step_outputs import SpelledOut
from wire.ids import RequestId
from wire.messages import Assignment
from wire.sampling import SamplingParams

EOS = 0


def run_stub(*requests: Assignment) -> dict[str, list[SequenceOutput]]:
    engine = StubEngine(rank_options(max_num_seqs=2, max_model_len=32), LayerCounter())
    for request in requests:
        engine.add(request)
    outputs: dict[str, list[SequenceOutput]] = {}
    spelled_out = SpelledOut()
    while engine.has_work:
        for output in spelled_out.outputs(engine.step()):
            outputs.setdefault(output.request_id, []).append(output)
    return outputs


def run_one(
    sampling: SamplingParams, *, generated: tuple[int, ...] = ()
) -> tuple[list[int], SequenceOutput]:
    request = assignment("r", [5, 6, 7], sampling, generated=generated)
    outputs = run_stub(request)["r"]
    return tokens_of(outputs), outputs[-1]


def test_it_says_the_prompt_and_ends() -> None:
    tokens, last = run_one(SamplingParams())
    assert tokens == [5, 6, 7, EOS]
    assert (last.finish_reason, last.stop_token_id) == ("stop", EOS)


@pytest.mark.parametrize(
    ("sampling", "tokens", "finish_reason"),
    [
        (SamplingParams(max_tokens=2), [5, 6], "length"),
        (SamplingParams(max_tokens=5, ignore_eos=True), [5, 6, 7, 5, 6], "length"),
        (SamplingParams(min_tokens=4), [5, 6, 7, 5, EOS], "stop"),
        (SamplingParams(stop_token_ids=(6,)), [5, 6], "stop"),
        (SamplingParams(stop_token_ids=(6,), min_tokens=2), [5, 6, 7, EOS], "stop"),
    ],
)
def test_it_keeps_to_the_sampling_parameters(
    sampling: SamplingParams, tokens: list[int], finish_reason: str
) -> None:
    generated, last = run_one(sampling)
    assert (generated, last.finish_reason) == (tokens, finish_reason)


def test_it_resumes_and_ends_what_was_complete() -> None:
    assert run_one(SamplingParams(), generated=(5, 6))[0] == [7, EOS]
    tokens, last = run_one(SamplingParams(), generated=(5, 6, 7, EOS))
    assert (tokens, last.finish_reason) == ([], "stop")


def test_the_end_of_the_context_ends_it() -> None:
    tokens, last = run_one(SamplingParams(ignore_eos=True))
    assert (len(tokens), last.finish_reason) == (29, "length")


def test_more_requests_than_rows_are_served_in_turn_and_bad_ones_refused() -> None:
    outputs = run_stub(
        *(assignment(f"r{i}", [i + 1]) for i in range(5)),
        assignment("empty", []),
        assignment("long", range(1, 40)),
    )
    assert [tokens_of(outputs[f"r{i}"]) for i in range(5)] == [[i + 1, EOS] for i in range(5)]
    assert outputs["empty"][0].error is not None
    assert outputs["long"][0].error is not None


def test_an_aborted_request_is_not_heard_of_again() -> None:
    engine = StubEngine(rank_options(), LayerCounter())
    engine.add(assignment("a", [1]))
    engine.add(assignment("b", []))
    engine.abort(RequestId("a"))
    engine.abort(RequestId("b"))
    assert not engine.has_work


def test_its_tokenizer_gives_every_text_back() -> None:
    card = stub_model_card()
    tokenizer = Tokenizer.from_str(card.tokenizer_json.decode())
    text = "Grüße, 世界!\n\t\x00 two  spaces"
    encoded = tokenizer.encode(text).ids
    assert len(encoded) == len(text.encode())
    assert max(encoded) < card.vocab_size == tokenizer.get_vocab_size()
    assert EOS not in encoded
    assert tokenizer.decode([*encoded, EOS], skip_special_tokens=True) == text


def test_the_rank_process_and_the_stub_load_no_torch() -> None:
    code = (
        "import sys, gpu_worker.rank, gpu_worker.engine.stub, gpu_worker.rank_protocol;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
