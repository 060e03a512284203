"""`forebay submit`: one request from the command line."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import TYPE_CHECKING, Any

import click

from forebay.address import server_url
from forebay.cli.embedded import load_local, local_options
from forebay.cli.redis_option import redis_option
from service.command import complain, settings_options
from service.exit_codes import ExitCode
from service.lifecycle import shutdown_signals, unless_stopped
from service.settings import CommonSettings, LocalSettings
from wire.errors import InvalidRequest
from wire.sampling import SamplingParams

if TYPE_CHECKING:
    from producer import RequestHandle


@click.command(
    "submit",
    short_help="Ask one thing and print the answer.",
    context_settings={"max_content_width": 100},
)
@click.argument("prompt")
@click.option("--stream", is_flag=True, help="Print the answer as it comes.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it stands, not as a chat.")
@click.option("--model", metavar="NAME", help="Which model, if several are served.")
@click.option(
    "--max-tokens", type=int, help="Length of the answer; up to the context if not given."
)
@click.option("--temperature", type=float, default=1.0, show_default=True, help="0 is greedy.")
@click.option("--seed", type=int, help="Makes a sampled answer repeatable.")
@click.option("--timeout-s", type=float, help="Give up on the answer after so many seconds.")
@redis_option
@local_options("state_dir")
@settings_options(CommonSettings, only=("namespace", "log_level", "log_format"))
def submit_command(
    prompt: str,
    stream: bool,
    raw: bool,
    model: str | None,
    max_tokens: int | None,
    temperature: float,
    seed: int | None,
    timeout_s: float | None,
    **flags: Any,
) -> int:
    """Submit PROMPT (- reads it from stdin) and print the answer on stdout.

    Example:

    \b
      forebay submit "Why is the sky blue?" --stream
    """
    settings = load_local(flags, verbose=False)
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise InvalidRequest("the prompt is empty; say something", field="prompt")
    request = {
        **({"prompt": text} if raw else {"messages": [{"role": "user", "content": text}]}),
        "model": model,
        "priority": "interactive",
        "stream": stream,
        "timeout_s": timeout_s,
        "sampling": SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed),
    }
    if asyncio.run(_submit(server_url(settings), settings, request)) is None:
        complain("interrupted; the request was cancelled")
        return ExitCode.INTERRUPTED
    return ExitCode.OK


async def _submit(url: str, settings: LocalSettings, request: dict[str, Any]) -> bool | None:
    from producer import Producer

    async with (
        shutdown_signals() as stop,
        Producer(
            url,
            namespace=settings.namespace,
            max_queued=settings.max_queued,
            result_ttl_s=settings.result_ttl_s,
        ) as producer,
    ):
        handle = await producer.submit(**request)
        try:
            printed = await unless_stopped(_print_answer(handle, stream=request["stream"]), stop)
        except BrokenPipeError:
            # Whoever reads has enough of the answer, as in `forebay submit ... | head`.
            await handle.cancel()
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return True
        if printed is None:
            await handle.cancel()
        return printed


async def _print_answer(handle: RequestHandle, *, stream: bool) -> bool:
    if stream:
        async for chunk in handle:
            print(chunk.text, end="", flush=True)
        print(flush=True)
    else:
        print((await handle.result()).text, flush=True)
    return True
