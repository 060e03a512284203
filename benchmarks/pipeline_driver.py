"""The whole pipeline, driven like any contender: what `forebay run-batch` does, kept up.

    python -m benchmarks.pipeline_driver --model model.gguf [--dtype float16 ...]

Speaks `benchmarks/peers/channel.py`. Brings up a broker, a scheduler and a worker group as the
command does, waits until they serve, and then runs one batch after another through them: each run
reads the input file and writes the output file, and is timed from before the first row is read
until after the last is written. Every run is another tenant's, whose prefixes share nothing with
earlier ones'. That is all that sets it apart from the command: start-up and shut-down lie outside
the timed part, as they do for the other contenders.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from pathlib import Path
from typing import Any

from benchmarks.flags import worker_settings
from benchmarks.peers.channel import Channel, Request, fail, versions
from benchmarks.workloads import Row, Workload, write_workload
from forebay.fleet import wait_until_serving
from forebay.local import LocalPipeline, local_pipeline
from forebay.paths import run_directory
from producer import Producer
from producer.batch import BatchOptions, open_files, run_batch
from service import logs
from service.settings import LocalSettings
from wire.ids import RequestId
from wire.messages import Request as SubmittedRequest
from wire.messages import Result


class Recorder:
    """A producer that also keeps the token ids of the results, which the output file lacks."""

    def __init__(self, producer: Producer) -> None:
        self._producer = producer
        self._row_numbers: dict[RequestId, int] = {}
        self.outputs: dict[int, list[int]] = {}

    async def submit_many(
        self,
        requests: AsyncIterable[SubmittedRequest] | Iterable[SubmittedRequest],
        *,
        max_in_flight: int = 256,
        forget: bool = False,
        adopt: bool = False,
    ) -> AsyncIterator[Result]:
        """See `Producer.submit_many`."""
        results = self._producer.submit_many(
            self._numbered(requests), max_in_flight=max_in_flight, forget=forget, adopt=adopt
        )
        async for result in results:
            self.outputs[self._row_numbers[result.request_id]] = list(result.token_ids)
            yield result

    async def _numbered(
        self, requests: AsyncIterable[SubmittedRequest] | Iterable[SubmittedRequest]
    ) -> AsyncIterator[SubmittedRequest]:
        assert isinstance(requests, AsyncIterable)
        async for request in requests:
            self._row_numbers[request.request_id] = len(self._row_numbers)
            yield request


class PipelineEngine:
    """One batch run after another. The channel's thread calls; the work is done in `loop`."""

    def __init__(
        self,
        producer: Producer,
        directory: Path,
        settings: dict[str, Any],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.settings = settings
        self._producer = producer
        self._input, self._output = directory / "in.jsonl", directory / "out.jsonl"
        self._loop = loop
        self._num_runs = 0

    def prepare(self, requests: list[Request]) -> None:
        """Write the input file."""
        self._num_runs += 1
        rows = tuple(Row(r.custom_id, tuple(r.prompt), r.num_tokens) for r in requests)
        write_workload(Workload("run", rows), self._input)

    def run(self, requests: list[Request]) -> list[list[int]]:
        """From the input file to the output file."""
        recorder = Recorder(self._producer)
        asyncio.run_coroutine_threadsafe(self._run(recorder), self._loop).result()
        return [recorder.outputs[i] for i in range(len(requests))]

    async def _run(self, recorder: Recorder) -> None:
        options = BatchOptions(
            str(self._input), str(self._output), restart=True, tenant=f"run-{self._num_runs}"
        )
        with open_files(options) as files:
            summary = await run_batch(options, recorder, files=files)
        if summary.num_failed:
            raise RuntimeError(f"rows failed: {dict(summary.failed_by_code)}")


async def serve(channel: Channel, words: list[str]) -> None:
    """Bring the pipeline up, obey, and take it down again."""
    _, given = worker_settings(words)
    settings = LocalSettings.load()
    with run_directory() as directory, tempfile.TemporaryDirectory() as files:
        async with local_pipeline(
            directory, settings=settings, worker_flags=given, verbose=True
        ) as pipeline:
            work = _serve(channel, pipeline, settings, Path(files), given)
            await pipeline.run(work, stop=asyncio.Event())


async def _serve(
    channel: Channel,
    pipeline: LocalPipeline,
    settings: LocalSettings,
    files: Path,
    given: dict[str, str],
) -> None:
    await wait_until_serving(pipeline.url, settings.namespace, num_groups=settings.groups)
    async with Producer(pipeline.url, namespace=settings.namespace) as producer:
        engine = PipelineEngine(producer, files, dict(given), asyncio.get_running_loop())
        await asyncio.to_thread(channel.serve, engine, versions("forebay", "torch"))


def main() -> None:
    """Serve."""
    channel = Channel()
    try:
        logs.configure(level="warning", log_format="json", service="benchmark")
        asyncio.run(serve(channel, sys.argv[1:]))
    except Exception as error:
        fail(channel, error)
        raise


if __name__ == "__main__":
    main()
