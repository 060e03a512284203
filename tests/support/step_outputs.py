"""A step's columns spelled out, for tests that look at every token of every sequence."""

from __future__ import annotations

from dataclasses import replace

from gpu_worker.rank_protocol import SequenceOutput, StepOutput
from wire.ids import token_ids


class SpelledOut:
    """Reads all steps of one engine, from the first one on."""

    def __init__(self) -> None:
        self._first: dict[int, SequenceOutput] = {}

    def outputs(self, step: StepOutput) -> list[SequenceOutput]:
        """An output for each sequence that the step gave something, as if there were no columns."""
        for output in step.outputs:
            if output.index is not None:
                first = self._first.setdefault(output.index, output)
                assert (first.request_id, first.fence) == (output.request_id, output.fence)
        told = {output.request_id for output in step.outputs}
        columns = [
            replace(self._first[index], token_ids=token_ids([token_id]), logprobs=None)
            for index, token_id in zip(step.indices, step.token_ids, strict=True)
        ]
        assert told.isdisjoint(output.request_id for output in columns)
        return [*step.outputs, *columns]
