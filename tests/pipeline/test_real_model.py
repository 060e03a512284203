"""The whole pipeline on the real model, sharded over two ranks, against `transformers`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gpu_worker.models.card import load_model_card
from pipeline.conftest import SCHEDULER, Services
from producer import Producer
from scheduler.tokenization import PromptTokenizer
from support.greedy_reference import assert_greedy, load_reference
from support.model_files import gguf_path, hf_model_dir
from wire.ids import RequestId, TokenIds
from wire.messages import ChatMessage, Prompt, Request
from wire.sampling import SamplingParams

QUESTIONS = ("Why is the sky blue?", "Name three rivers.", "What is 7 times 8?", "Say hello.")


@pytest.mark.slow
async def test_what_comes_out_of_redis_is_the_reference_s_greedy_answer(
    services: Services, redis_url: str
) -> None:
    services.start(*SCHEDULER)
    services.start(
        "gpu_worker",
        "--model",
        str(gguf_path()),
        "--tensor-parallel-size",
        "2",
        threads=1,
        dtype="float32",
        kv_cache_bytes="64MiB",
    )
    requests = [
        Request(
            RequestId(f"question-{index}"),
            Prompt(messages=(ChatMessage("user", question),)),
            SamplingParams(max_tokens=32, temperature=0.0),
        )
        for index, question in enumerate(QUESTIONS)
    ]
    answers: dict[RequestId, TokenIds] = {}
    async with Producer(redis_url) as producer:
        async for result in producer.submit_many(requests):
            assert result.state == "done", result.error
            answers[result.request_id] = result.token_ids
    services.end_all()

    reference = load_reference(hf_model_dir())
    card = load_model_card(gguf_path(), name=None, block_size=16, max_model_len=None)
    prompts = PromptTokenizer(card).tokenize(requests)
    for request, prompt in zip(requests, prompts, strict=True):
        assert not isinstance(prompt, Exception)
        assert_greedy(reference, list(prompt), list(answers[request.request_id]))


@pytest.mark.slow
def test_a_batch_run_answers_from_one_command(tmp_path: Path) -> None:
    rows = [
        {
            "custom_id": f"row-{index}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "messages": [{"role": "user", "content": question}],
                "max_tokens": 8,
                "temperature": 0,
                "logprobs": True,
                "top_logprobs": 2,
            },
        }
        for index, question in enumerate(QUESTIONS)
    ]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "forebay", "run-batch", "-i", str(source), "-o", str(output)]
    command += ["--model", str(gguf_path()), "--threads", "1", "--kv-cache-bytes", "64MiB"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert run.returncode == 0, run.stderr
    assert "4: 4 answered, 0 failed" in run.stderr
    answers = {row["custom_id"]: row for row in map(json.loads, output.read_text().splitlines())}
    assert set(answers) == {f"row-{index}" for index in range(4)}
    for answer in answers.values():
        body = answer["response"]["body"]
        [choice] = body["choices"]
        assert body["usage"]["completion_tokens"] <= 8
        assert choice["finish_reason"] in ("stop", "length")
        spoken = choice["logprobs"]["content"]
        assert len(spoken) == body["usage"]["completion_tokens"]
        # Greedy: the token that was taken is the likeliest, and its text is in the answer.
        assert all(token["token"] == token["top_logprobs"][0]["token"] for token in spoken)
        assert choice["message"]["content"].startswith(spoken[0]["token"].strip())
