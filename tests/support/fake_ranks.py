"""Tiny processes in the place of ranks, which do what a test wants them to do."""

from __future__ import annotations

import sys
import textwrap

import pytest

import gpu_worker.rank_group
from gpu_worker.rank_options import RankOptions

PRELUDE = """
import os, signal, socket, sys, time
from gpu_worker.rank_protocol import *
from wire.ids import token_ids
rank, life, fd = map(int, sys.argv[1:])
if rank == 0:
    sock = socket.socket(fileno=fd)
    channel = RankChannel(sock)
ready = RankReady(num_blocks=1, max_model_len=2, vocab_size=3, load_s=0.5)

def requests():
    "The next assignments that come; exits when told to stop."
    while True:
        found = []
        for frame in channel.receive(wait=True):
            if isinstance(frame, Stop):
                sys.exit(0)
            if isinstance(frame, AddRequests):
                found += frame.assignments
        if found:
            return found

def answer(assignments):
    "Each with one token."
    outputs = [
        SequenceOutput(a.request_id, a.fence, token_ids([5]), finish_reason="length")
        for a in assignments
    ]
    channel.send(StepOutput(tuple(outputs), EngineStats()))

def serve():
    while True:
        answer(requests())
"""


def ranks_that(monkeypatch: pytest.MonkeyPatch, behaviour: str) -> None:
    """Have `behaviour` run in the place of each rank.

    It knows its `rank`, and in which `life` of the ranks it is, the first being 1. The names above
    are at its disposal; on rank 0 `channel` and `sock` as well.
    """
    source = PRELUDE + textwrap.dedent(behaviour)
    num_lives = 0

    def command(
        options: RankOptions, *, rank: int, size: int, rendezvous: str, socket_fd: int | None
    ) -> list[str]:
        nonlocal num_lives
        num_lives += rank == 0
        fd = -1 if socket_fd is None else socket_fd
        return [sys.executable, "-c", source, str(rank), str(num_lives), str(fd)]

    monkeypatch.setattr(gpu_worker.rank_group, "rank_command", command)
