"""What a group holds, and what of it Redis has yet to be told. Pure: no connection, no clock."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from gpu_worker.output import RequestOutput, TextDecoder
from gpu_worker.rank_protocol import SequenceOutput
from wire.codec import encode
from wire.ids import RequestId
from wire.messages import Assignment, ErrorInfo, Result, TerminalState
from wire.scripts import Progress


class Ledger:
    """The outputs of a group's requests, from assignment to the commit of the terminal result."""

    def __init__(self, decoder: TextDecoder, *, model: str, block_size: int) -> None:
        self._decoder = decoder
        self._model = model
        self._block_size = block_size
        self._outputs: dict[RequestId, RequestOutput] = {}
        self._ended: dict[RequestId, tuple[TerminalState, ErrorInfo | None]] = {}
        self._uncommitted: list[Progress] = []

    def __len__(self) -> int:
        return len(self._outputs)

    def open(self, assignment: Assignment) -> None:
        """Begin with a request; one of the same id under an older fence is forgotten."""
        self.forget([assignment.request_id])
        self._outputs[assignment.request_id] = RequestOutput(assignment, self._decoder)

    def add(self, outputs: Iterable[SequenceOutput]) -> list[RequestId]:
        """Take in a step's outputs. Returns the ids that a stop string has ended."""
        stopped = []
        for output in outputs:
            request = self._outputs.get(output.request_id)
            if request is None or request.assignment.fence != output.fence:
                continue  # stopped or replaced while the step ran
            if output.request_id in self._ended:
                continue
            if request.add(output):
                stopped.append(output.request_id)
            if request.state is not None:
                self._ended[output.request_id] = (request.state, None)
        return stopped

    def end(
        self, request_id: RequestId, state: TerminalState, error: ErrorInfo | None = None
    ) -> bool:
        """End a request from outside, with what it has so far. False if it has ended already."""
        if request_id not in self._outputs or request_id in self._ended:
            return False
        self._ended[request_id] = (state, error)
        return True

    def refuse(self, request_id: RequestId, fence: int, error: ErrorInfo) -> None:
        """Fail a request that cannot be begun."""
        result = Result(request_id, "failed", model=self._model, error=error)
        self._uncommitted.append(Progress(request_id, fence, state="failed", result=encode(result)))

    def past_deadline(self, server_ms: int) -> list[RequestId]:
        """The running requests whose time is up."""
        return [
            request_id
            for request_id, request in self._outputs.items()
            if request.assignment.deadline_ms is not None
            and request.assignment.deadline_ms <= server_ms
            and request_id not in self._ended
        ]

    def uncommitted(self) -> Sequence[Progress]:
        """What to write to Redis: the same until it is `committed`, so that it can be repeated."""
        if not self._uncommitted:
            progress = map(self._progress, self._outputs.values())
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
        self.forget(item.request_id for item in current if item.state is not None)
        return self.forget(item.request_id for item in current if item.request_id in stale)

    def forget(self, request_ids: Iterable[RequestId]) -> list[RequestId]:
        """Drop requests, whatever their state. Returns those that were held."""
        held = [request_id for request_id in request_ids if request_id in self._outputs]
        for request_id in held:
            del self._outputs[request_id]
            self._ended.pop(request_id, None)
        return held

    def clear(self) -> list[RequestId]:
        """Drop everything, also what is not written yet. Returns the ids that were held."""
        self._uncommitted.clear()
        return self.forget(list(self._outputs))

    def _fence_of(self, request_id: RequestId) -> int | None:
        request = self._outputs.get(request_id)
        return None if request is None else request.assignment.fence

    def _progress(self, request: RequestOutput) -> Progress | None:
        """What to write for a request now: a stream's tokens at once, others' block by block."""
        assignment = request.assignment
        state, error = self._ended.get(request.request_id, (None, None))
        at_least = 1 if assignment.stream else self._block_size
        chunk = None
        # Without a stream, the result is all that a reader needs at the end.
        if request.num_unsent_tokens >= at_least and (assignment.stream or state is None):
            chunk = request.take_chunk(ended=state is not None)
        if chunk is None and state is None:
            return None
        result = None if state is None else request.result(state, self._model, error)
        return Progress(
            request.request_id,
            assignment.fence,
            chunk=b"" if chunk is None else encode(chunk),
            state=state,
            result=b"" if result is None else encode(result),
            offset=0 if chunk is None else chunk.offset,
            num_tokens=0 if chunk is None else len(chunk.token_ids),
        )
