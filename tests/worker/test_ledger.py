"""What a group owes to Redis: repeatable until it is written, and never for a lost request."""

from __future__ import annotations

import pytest

from gpu_worker.engine.stub import stub_model_card
from gpu_worker.ledger import Ledger
from gpu_worker.rank_protocol import SequenceOutput
from gpu_worker.text import TextDecoder
from wire.codec import decode
from wire.ids import RequestId, token_ids
from wire.messages import Assignment, Chunk, ErrorInfo, FinishReason, Result
from wire.sampling import SamplingParams
from wire.scripts import Progress

BLOCK_SIZE = 4
DECODER = TextDecoder(stub_model_card().tokenizer_json)
A, B = RequestId("a"), RequestId("b")


def ledger() -> Ledger:
    return Ledger(DECODER, model="m", block_size=BLOCK_SIZE)


def assignment(
    request_id: RequestId = A,
    fence: int = 1,
    *,
    stream: bool = True,
    deadline_ms: int | None = None,
    stop: tuple[str, ...] = (),
) -> Assignment:
    sampling = SamplingParams(stop=stop)
    return Assignment(request_id, fence, token_ids([1]), sampling, stream, deadline_ms=deadline_ms)


def step(
    request_id: RequestId = A,
    *tokens: int,
    fence: int = 1,
    end: FinishReason | None = None,
    error: ErrorInfo | None = None,
) -> SequenceOutput:
    return SequenceOutput(request_id, fence, token_ids(tokens), finish_reason=end, error=error)


def chunk_of(progress: Progress) -> list[int]:
    return list(decode(Chunk, progress.chunk).token_ids)


def result_of(progress: Progress) -> Result:
    return decode(Result, progress.result)


def test_a_streams_tokens_are_due_at_once_and_others_by_the_block() -> None:
    book = ledger()
    book.open(assignment(A))
    book.open(assignment(B, stream=False))
    book.add([step(A, 5), step(B, 5, 6, 7)])
    [due] = book.uncommitted()
    assert (due.request_id, chunk_of(due), due.offset, due.num_tokens) == (A, [5], 0, 1)
    book.committed([due], [])
    book.add([step(B, 8)])
    [due] = book.uncommitted()
    assert (due.request_id, chunk_of(due)) == (B, [5, 6, 7, 8])


def test_what_is_due_stays_the_same_until_it_is_written() -> None:
    book = ledger()
    book.open(assignment())
    book.add([step(A, 5)])
    first = list(book.uncommitted())
    book.add([step(A, 6)])
    assert list(book.uncommitted()) == first, "it may have been written: the reply was lost"
    assert book.committed(first, []) == []
    [second] = book.uncommitted()
    assert (chunk_of(second), second.offset) == ([6], 1)
    book.committed([second], [])
    assert list(book.uncommitted()) == []


def test_it_can_be_written_in_pieces() -> None:
    book = ledger()
    for request_id in (A, B):
        book.open(assignment(request_id))
        book.add([step(request_id, 5)])
    book.committed(book.uncommitted()[:1], [])
    assert [item.request_id for item in book.uncommitted()] == [B]


def test_an_end_is_due_with_its_last_tokens_and_then_forgotten() -> None:
    book = ledger()
    book.open(assignment())
    book.add([step(A, 5, end="length")])
    [due] = book.uncommitted()
    assert (due.state, chunk_of(due), list(result_of(due).token_ids)) == ("done", [5], [5])
    assert len(book) == 1
    assert book.committed([due], []) == []
    assert len(book) == 0


def test_without_a_stream_the_end_is_the_result_alone() -> None:
    book = ledger()
    book.open(assignment(stream=False))
    book.add([step(A, 5, 6, 7, 8, 9, end="stop")])
    [due] = book.uncommitted()
    assert (due.state, due.chunk) == ("done", b"")
    assert list(result_of(due).token_ids) == [5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("code", "state"),
    [
        ("invalid_request", "failed"),
        ("context_length_exceeded", "failed"),
        ("numerical_error", "retry"),
        ("an error of a later version", "retry"),
    ],
)
def test_only_an_error_that_is_the_requests_own_fault_is_final(code: str, state: str) -> None:
    book = ledger()
    book.open(assignment())
    error = ErrorInfo(code, "no", "prompt")
    book.add([step(A, error=error)])
    assert book.num_running == 0
    [due] = book.uncommitted()
    assert due.state == state
    assert (result_of(due).state, result_of(due).error) == ("failed", error), "if it is the last"
    book.committed([due], [])
    assert len(book) == 0


def test_what_cannot_be_read_here_may_be_read_elsewhere() -> None:
    book = ledger()
    book.refuse(A, 3, ErrorInfo("wire_error", "a field too many"))
    assert book.request_ids == [A]
    [due] = book.uncommitted()
    assert (due.fence, due.state, result_of(due).state) == (3, "retry", "failed")


@pytest.mark.parametrize("stream", [True, False])
def test_another_attempt_goes_on_behind_the_tokens_of_the_failed_one(stream: bool) -> None:
    """All of them are journaled, and text that may yet become a stop string is held back still."""
    book = ledger()
    text = DECODER.token_text
    book.open(assignment(stream=stream, stop=(text(6) + text(7),)))
    book.add([step(A, 5, 6), step(A, error=ErrorInfo("numerical_error", "no"))])
    [due] = book.uncommitted()
    assert (due.state, chunk_of(due), due.num_tokens) == ("retry", [5, 6], 2)
    assert decode(Chunk, due.chunk).text == text(5)
    assert result_of(due).text == text(5) + text(6)


# Columns: one token for each of many sequences


def known(book: Ledger, request_id: RequestId, index: int, *, stop: tuple[str, ...] = ()) -> None:
    """Begin a request, and let the ranks say its first token and by what number they name it."""
    book.open(assignment(request_id, stream=False, stop=stop))
    book.add([SequenceOutput(request_id, 1, token_ids([5]), index=index)])


def test_columns_go_to_the_requests_that_the_indices_name() -> None:
    book = ledger()
    known(book, A, 7)
    known(book, B, 3)
    assert book.add_tokens(token_ids([3, 7, 9]), token_ids([20, 30, 40])) == []
    assert list(book.uncommitted()) == []
    for token in (21, 22):
        book.add_tokens(token_ids([3]), token_ids([token]))
    assert book.is_due
    written = {item.request_id: chunk_of(item) for item in book.uncommitted()}
    assert written == {B: [5, 20, 21, 22], A: [5, 30]}, "half a block goes along"


def test_what_has_ended_takes_no_tokens_from_columns() -> None:
    book = ledger()
    known(book, A, 1, stop=(DECODER.token_text(7),))
    known(book, B, 2)
    assert book.add_tokens(token_ids([1, 2]), token_ids([7, 7])) == [A]
    book.end(B, "cancelled")
    book.add_tokens(token_ids([1, 2]), token_ids([8, 8]))
    ended = {item.request_id: result_of(item) for item in book.uncommitted()}
    assert {rid: list(result.token_ids) for rid, result in ended.items()} == {A: [5, 7], B: [5, 7]}
    assert (ended[A].state, ended[B].state) == ("done", "cancelled")


def test_a_replaced_request_has_another_index() -> None:
    book = ledger()
    known(book, A, 1)
    book.open(assignment(A, fence=2))
    book.add_tokens(token_ids([1]), token_ids([6]))
    book.add([SequenceOutput(A, 2, token_ids([8]), index=4)])
    book.add_tokens(token_ids([1, 4]), token_ids([6, 9]))
    [due] = book.uncommitted()
    assert (due.fence, chunk_of(due)) == (2, [8, 9])


# A server that has lost its last moments


def test_tokens_that_the_server_has_lost_are_written_again() -> None:
    book = ledger()
    book.open(assignment())
    for token in (5, 6, 7):
        book.add([step(A, token)])
        book.committed(list(book.uncommitted()), [])
    assert book.rewind({A: 1}) == 1
    [due] = book.uncommitted()
    chunk = decode(Chunk, due.chunk)
    assert (due.offset, due.num_tokens, chunk_of(due)) == (1, 2, [6, 7])
    assert (chunk.offset, chunk.text_offset) == (1, 1)
    book.committed([due], [])
    assert book.rewind({A: 3}) == 0


def test_a_chunk_that_was_on_its_way_is_cut_anew_behind_what_was_lost() -> None:
    book = ledger()
    for request_id in (A, B):
        book.open(assignment(request_id))
    book.add([step(A, 5), step(B, 8)])
    book.committed(list(book.uncommitted()), [])
    book.add([step(A, 6, end="length"), step(B, 9)])
    on_its_way = list(book.uncommitted())
    assert [item.offset for item in on_its_way] == [1, 1]
    assert book.rewind({A: 0, B: 1}) == 1
    [of_b] = book.uncommitted()
    assert of_b is on_its_way[1]
    book.committed([of_b], [])
    [of_a] = book.uncommitted()
    assert (of_a.state, of_a.offset, chunk_of(of_a)) == ("done", 0, [5, 6])


def test_a_chunk_whose_reply_was_lost_is_no_loss_of_the_servers() -> None:
    """Whether it was written or not, it is sent again as it was: the journal takes it once."""
    for num_journaled in (1, 2):
        book = ledger()
        book.open(assignment())
        book.add([step(A, 5)])
        book.committed(list(book.uncommitted()), [])
        book.add([step(A, 6)])
        unanswered = list(book.uncommitted())
        assert book.rewind({A: num_journaled}) == 0
        assert list(book.uncommitted()) == unanswered


def test_a_stop_string_ends_it_and_what_the_engine_says_later_is_ignored() -> None:
    book = ledger()
    text = DECODER.token_text
    book.open(assignment(stop=(text(7),)))
    assert book.add([step(A, 5), step(A, 7), step(A, 9)]) == [A]
    [due] = book.uncommitted()
    assert result_of(due).text == text(5)
    assert list(result_of(due).token_ids) == [5, 7]


def test_stale_requests_are_forgotten_and_must_be_stopped() -> None:
    book = ledger()
    for request_id in (A, B):
        book.open(assignment(request_id))
        book.add([step(request_id, 5)])
    assert book.committed(list(book.uncommitted()), [A]) == [A]
    assert len(book) == 1


def test_a_request_that_came_back_meanwhile_is_not_confused_with_its_past() -> None:
    book = ledger()
    book.open(assignment(fence=1))
    book.add([step(A, 5, fence=1, end="length")])
    past = list(book.uncommitted())
    book.open(assignment(fence=3))
    assert book.committed(past, [A]) == []
    assert len(book) == 1
    assert book.add([step(A, 6, fence=1)]) == []
    assert list(book.uncommitted()) == []
    book.add([step(A, 7, fence=3)])
    [due] = book.uncommitted()
    assert (due.fence, chunk_of(due)) == (3, [7])


def test_what_is_new_after_a_clearing_is_not_taken_for_what_was_sent_before() -> None:
    book = ledger()
    book.open(assignment())
    book.add([step(A, 5)])
    sent = list(book.uncommitted())
    assert book.clear() == [A]
    error = ErrorInfo("wire_error", "no")
    book.refuse(B, 4, error)
    assert book.committed(sent, []) == []
    [due] = book.uncommitted()
    assert (due.request_id, due.fence) == (B, 4)
    assert result_of(due).error == error


def test_an_end_from_outside_keeps_what_was_generated() -> None:
    book = ledger()
    book.open(assignment())
    book.add([step(A, 5)])
    assert book.end(A, "cancelled")
    assert not book.end(A, "expired"), "the first end counts"
    assert not book.end(B, "cancelled")
    book.add([step(A, 6, end="length")])
    [due] = book.uncommitted()
    assert (due.state, list(result_of(due).token_ids)) == ("cancelled", [5])
    assert result_of(due).finish_reason is None


def test_deadlines_are_those_of_running_requests() -> None:
    book = ledger()
    book.open(assignment(A, deadline_ms=1000))
    book.open(assignment(B))
    assert book.past_deadline(999) == []
    assert book.past_deadline(1000) == [A]
    book.end(A, "expired")
    assert book.past_deadline(2000) == []
