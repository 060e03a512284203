"""`forebay status`: who is at work and what waits, for people and for health checks."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from forebay.address import server_url
from forebay.cli.embedded import load_local, local_options
from forebay.cli.redis_option import redis_option
from service.command import complain, settings_options
from service.exit_codes import ExitCode
from service.settings import CommonSettings

if TYPE_CHECKING:
    from forebay.fleet import FleetStatus
    from wire.messages import GroupStatus


@click.command("status", short_help="Show who is at work, and what waits.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--need-scheduler", is_flag=True, help="Fail unless a scheduler is alive.")
@click.option("--need-group", metavar="ID", help="Fail unless this worker group is alive.")
@redis_option
@local_options("state_dir")
@settings_options(CommonSettings, only=("namespace", "log_level", "log_format"))
def status_command(
    as_json: bool, need_scheduler: bool, need_group: str | None, **flags: Any
) -> int:
    """Show the schedulers and worker groups that are alive, and what waits for them.

    Example:

    \b
      forebay status --need-scheduler
    """
    from forebay.fleet import fleet_status

    settings = load_local(flags, verbose=False)
    status = asyncio.run(fleet_status(server_url(settings), settings.namespace))
    print(json.dumps(asdict(status), indent=2) if as_json else "\n".join(_lines(status)))
    missing = []
    if need_scheduler and not status.num_schedulers:
        missing.append("no scheduler is alive; start `forebay scheduler`")
    if need_group and need_group not in {group.group_id for group in status.groups}:
        missing.append(f"the group {need_group} is not alive; start it with `forebay worker`")
    for problem in missing:
        complain(problem)
    return ExitCode.PIPELINE_DOWN if missing else ExitCode.OK


_SEE = "; see `forebay dead-letters list`"


def _lines(status: FleetStatus) -> list[str]:
    return [
        f"schedulers  {status.num_schedulers}",
        f"groups      {len(status.groups)}",
        *(_line(group) for group in status.groups),
        f"queued      {status.num_queued}, and {status.num_delayed} more after an error",
        f"dead        {status.num_dead_letters}" + (_SEE if status.num_dead_letters else ""),
    ]


def _line(group: GroupStatus) -> str:
    return (
        f"  {group.group_id}  {group.state}  {group.model}  "
        f"{group.tensor_parallel_size} ranks, {group.num_running} running, "
        f"{group.num_waiting} waiting, KV-cache {group.kv_cache_usage:.0%} used"
    )
