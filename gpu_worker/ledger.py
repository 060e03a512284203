"""What a group holds, and what of it Redis has yet to be told. Pure: no connection, no clock."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from gpu_worker.output import RequestOutput
from gpu_worker.rank_protocol import SequenceOutput
from gpu_worker.text import TextDecoder
from wire.codec import encode
from wire.errors import InvalidRequest, RequestTooLong
from wire.ids import RequestId, TokenIds
from wire.messages import Assignment, CommitState, ErrorInfo, Result, TerminalState
from wire.scripts import Progress

FINAL_ERRORS = frozenset({InvalidRequest.code, RequestTooLong.code})
"""The errors that are the request's own fault: every attempt would end in them, so the first one is
the last. After any other (numbers that are none, an assignment that this version cannot read) the
request is given back to be tried again, here or elsewhere, as often as the schedulers allow.

What a step as a whole dies of (no memory, an exception) is no error of a request: the ranks are
lost, and a crash is counted for all that they held.
"""


class Ledger:
    """The outputs of a group's requests, from assignment to the commit of the terminal result."""

    def __init__(self, decoder: TextDecoder, *, model: str, block_size: int) -> None:
        self._decoder = decoder
        self._model = model
        self._block_size = block_size
        self._outputs: dict[RequestId, RequestOutput] = {}
        self._by_index: dict[int, RequestOutput] = {}
        self._deadlines: dict[RequestId, int] = {}
        self._due: dict[RequestId, None] = {}  # of these something is to be written, in this order
        self._ended: dict[RequestId, tuple[CommitState, ErrorInfo | None]] = {}
        self._uncommitted: list[Progress] = []

    def __len__(self) -> int:
        return len(self._outputs)

    @property
    def num_running(self) -> int:
        """How many requests the engine has yet to end."""
        return len(self._outputs) - len(self._ended)

    @property
    def has_deadlines(self) -> bool:
        """Whether any of the running requests is to end at some time."""
        return bool(self._deadlines)

    @property
    def request_ids(self) -> list[RequestId]:
        """All requests of which something is, or will be, to be written."""
        return list({*self._outputs, *(item.request_id for item in self._uncommitted)})

    def open(self, assignment: Assignment) -> None:
        """Begin with a request; one of the same id under an older fence is forgotten."""
        request_id = assignment.request_id
        self.forget([request_id])
        self._outputs[request_id] = RequestOutput(
            assignment,
            self._decoder,
            chunk_tokens=1 if assignment.stream else self._block_size,
        )
        if assignment.deadline_ms is not None:
            self._deadlines[request_id] = assignment.deadline_ms

    def add(self, outputs: Iterable[SequenceOutput]) -> list[RequestId]:
        """Take in a step's outputs. Returns the ids that a stop string has ended.

        One that ended in an error is over, or to be tried again: see FINAL_ERRORS.
        """
        stopped = []
        for output in outputs:
            request = self._outputs.get(output.request_id)
            if request is None or request.assignment.fence != output.fence:
                continue  # stopped or replaced while the step ran
            if output.request_id in self._ended:
                continue
            if output.index is not None:
                request.index = output.index
                self._by_index[output.index] = request
            if request.add(output):
                stopped.append(output.request_id)
            if output.error is not None:
                self._end(output.request_id, _after(output.error), output.error)
            elif request.state is not None:
                self._end(output.request_id, request.state)
            elif request.has_chunk:
                self._due[output.request_id] = None
        return stopped

    def add_tokens(self, indices: TokenIds, token_ids: TokenIds) -> list[RequestId]:
        """Take in the columns of a step, a token for each index; else like `add`."""
        stopped = []
        for index, token_id in zip(indices, token_ids, strict=True):
            request = self._by_index.get(index)
            if request is None or not request.add_token(token_id):
                continue  # stopped or replaced while the step ran; or there is nothing to do yet
            if request.state is not None:
                self._end(request.request_id, request.state)
                stopped.append(request.request_id)
            else:
                self._due[request.request_id] = None
        return stopped

    def end(
        self, request_id: RequestId, state: TerminalState, error: ErrorInfo | None = None
    ) -> bool:
        """End a request from outside, with what it has so far. False if it has ended already."""
        if request_id not in self._outputs or request_id in self._ended:
            return False
        self._end(request_id, state, error)
        return True

    def refuse(self, request_id: RequestId, fence: int, error: ErrorInfo) -> None:
        """Give back a request that cannot be begun here; a group of another version may."""
        result = Result(request_id, "failed", model=self._model, error=error)
        self._uncommitted.append(Progress(request_id, fence, state="retry", result=encode(result)))

    def past_deadline(self, server_ms: int) -> list[RequestId]:
        """The running requests whose time is up."""
        return [
            request_id
            for request_id, deadline_ms in self._deadlines.items()
            if deadline_ms <= server_ms
        ]

    @property
    def is_due(self) -> bool:
        """Whether there is something to write: a stream's tokens, others' full blocks, ends."""
        return bool(self._uncommitted or self._due)

    def uncommitted(self) -> Sequence[Progress]:
        """What to write to Redis: the same until it is `committed`, so that it can be repeated."""
        if not self._uncommitted and self._due:
            self._take_along()
            due, self._due = self._due, {}
            progress = (self._progress(self._outputs[request_id]) for request_id in due)
            self._uncommitted = [item for item in progress if item is not None]
        return self._uncommitted

    def committed(
        self, progress: Sequence[Progress], stale: Collection[RequestId]
    ) -> list[RequestId]:
        """`progress`, from `uncommitted`, was sent, and all but the `stale` ones written.

        Returns the requests to stop: they are not this group's any more.
        """
        # By identity: while it was sent, the ledger may have been cleared and begun anew.
        sent = set(map(id, progress))
        self._uncommitted = [item for item in self._uncommitted if id(item) not in sent]
        # By id and fence: the request may have come back in the meantime, under a higher one.
        current = [item for item in progress if self._fence_of(item.request_id) == item.fence]
        for item in current:
            if item.chunk:
                self._outputs[item.request_id].written(item.offset + item.num_tokens)
        self.forget(item.request_id for item in current if item.state is not None)
        return self.forget(item.request_id for item in current if item.request_id in stale)

    def rewind(self, num_journaled: Mapping[RequestId, int]) -> int:
        """Have those tokens written again that the journals have lost since they were written.

        `num_journaled` has the journals' lengths. Returns of how many requests something was lost.
        """
        rewound = {
            request_id
            for request_id, num_tokens in num_journaled.items()
            if request_id in self._outputs and self._outputs[request_id].rewind(num_tokens)
        }
        self._uncommitted = [i for i in self._uncommitted if i.request_id not in rewound]
        self._due |= dict.fromkeys(rewound)
        return len(rewound)

    def forget(self, request_ids: Iterable[RequestId]) -> list[RequestId]:
        """Drop requests, whatever their state. Returns those that were held."""
        held = [request_id for request_id in request_ids if request_id in self._outputs]
        for request_id in held:
            self._cease(self._outputs.pop(request_id))
            self._ended.pop(request_id, None)
            self._due.pop(request_id, None)
        return held

    def clear(self) -> list[RequestId]:
        """Drop everything, also what is not written yet. Returns the ids that were held."""
        self._uncommitted.clear()
        return self.forget(list(self._outputs))

    def _end(
        self, request_id: RequestId, state: CommitState, error: ErrorInfo | None = None
    ) -> None:
        self._ended[request_id] = (state, error)
        self._due[request_id] = None
        self._cease(self._outputs[request_id])

    def _cease(self, request: RequestOutput) -> None:
        """It takes no tokens, and has no deadline, any more."""
        self._deadlines.pop(request.request_id, None)
        if request.index is not None:
            self._by_index.pop(request.index, None)

    def _take_along(self) -> None:
        """Where blocks are to be written, add those that are at least half full.

        Requests that take a token each in every step are then due in the same step the next time,
        and written by one call.
        """
        if any(self._goes_by_block(self._outputs[request_id]) for request_id in self._due):
            for request_id, request in self._outputs.items():
                if 2 * request.num_unsent_tokens >= self._block_size and self._goes_by_block(
                    request
                ):
                    self._due[request_id] = None

    def _goes_by_block(self, request: RequestOutput) -> bool:
        return not request.assignment.stream and request.request_id not in self._ended

    def _fence_of(self, request_id: RequestId) -> int | None:
        request = self._outputs.get(request_id)
        return None if request is None else request.assignment.fence

    def _progress(self, request: RequestOutput) -> Progress | None:
        """What to write for a request that is due: what it has beyond the journal, its end."""
        assignment = request.assignment
        state, error = self._ended.get(request.request_id, (None, None))
        # What was generated so far is where another attempt begins.
        goes_on = state is None or state == "retry"
        chunk = None
        # Without a stream, the result is all that a reader needs at the end.
        if assignment.stream or goes_on:
            chunk = request.take_chunk(ended=not goes_on)
        if chunk is None and state is None:
            return None
        return Progress(
            request.request_id,
            assignment.fence,
            chunk=b"" if chunk is None else encode(chunk),
            state=state,
            result=b"" if state is None else encode(self._result(request, state, error)),
            offset=0 if chunk is None else chunk.offset,
            num_tokens=0 if chunk is None else len(chunk.token_ids),
        )

    def _result(
        self, request: RequestOutput, state: CommitState, error: ErrorInfo | None
    ) -> Result:
        """The result to store; of a retry, should there be none."""
        return request.result("failed" if state == "retry" else state, self._model, error)


def _after(error: ErrorInfo) -> CommitState:
    """What becomes of a request that has ended in `error`."""
    return "failed" if error.code in FINAL_ERRORS else "retry"
