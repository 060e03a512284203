"""compose.yaml stays true: commands, variables, files and access rules are what the code knows."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import redis
import yaml

from forebay.broker_binary import BrokerBinary
from forebay.cli import cli
from forebay.fleet import fleet_status
from producer import Producer
from service.command import settings_options
from service.die_with_parent import command_line
from service.settings import SchedulerSettings, WorkerSettings, known_variables
from support.waiting import wait_until

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PASSWORD = "a-password-for-this-test"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
    return document


@pytest.fixture(scope="module")
def ours(compose: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The services that run Forebay."""
    return {
        name: service
        for name, service in compose["services"].items()
        if service["image"].startswith("forebay:")
    }


def parse(command: list[str]) -> click.Context:
    """Have the command line parse `command` without running it."""
    assert command[0] == "forebay"
    name, *arguments = command[1:]
    return cli.commands[name].make_context(name, arguments)


def test_it_has_a_server_a_scheduler_and_two_groups(ours: dict[str, dict[str, Any]]) -> None:
    commands = [service["command"][1] for service in ours.values()]
    assert sorted(commands) == ["scheduler", "worker", "worker"]


def test_every_command_and_health_check_is_one_that_the_command_line_accepts(
    ours: dict[str, dict[str, Any]],
) -> None:
    for service in ours.values():
        parse(service["command"])
        kind, *check = service["healthcheck"]["test"]
        assert kind == "CMD"
        parse(check)


def test_a_group_is_checked_under_its_own_name(ours: dict[str, dict[str, Any]]) -> None:
    workers = {name: s for name, s in ours.items() if s["command"][1] == "worker"}
    for name, service in workers.items():
        assert parse(service["command"]).params["group_id"] == name
        assert parse(service["healthcheck"]["test"][1:]).params["need_group"] == name


def test_every_variable_is_one_that_the_settings_know(ours: dict[str, dict[str, Any]]) -> None:
    for service in ours.values():
        unknown = service["environment"].keys() - known_variables()
        assert not unknown


def test_what_it_sets_makes_valid_settings(
    ours: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for service in ours.values():
        for name, value in service["environment"].items():
            monkeypatch.setenv(name, interpolate(value))
        flags = parse(service["command"]).params
        settings = WorkerSettings if service["command"][1] == "worker" else SchedulerSettings
        loaded = settings.load(**flags)
        assert loaded.redis_url_for_logs == "redis://forebay:***@redis:6379/0"


def test_nothing_runs_as_root_or_listens_beyond_loopback(compose: dict[str, Any]) -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert re.search(r"^USER forebay$", dockerfile, re.MULTILINE)
    for service in compose["services"].values():
        assert service["cap_drop"] == ["ALL"]
        assert service["read_only"] is True
        assert service.get("user", "forebay") in {"forebay", "redis"}
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_stopping_leaves_a_group_time_to_drain(ours: dict[str, dict[str, Any]]) -> None:
    for service in ours.values():
        if service["command"][1] == "worker":
            drain_s = float(service["environment"]["FOREBAY_DRAIN_TIMEOUT_S"])
            assert float(service["stop_grace_period"].removesuffix("s")) > drain_s


def test_every_file_that_it_mounts_or_builds_from_exists(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            if source.startswith("./"):
                assert (ROOT / source).exists(), source
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]).exists()


def test_the_image_gets_every_package(compose: dict[str, Any]) -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (\w+) \1$", dockerfile, re.MULTILINE)
    packages = {path.parent.name for path in ROOT.glob("*/py.typed")}
    assert set(copied) == packages
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert all(f"!{package}" in ignored for package in packages)


def test_no_secret_is_in_the_repository(compose: dict[str, Any]) -> None:
    rules = (DEPLOY / "users.acl").read_text()
    assert "user default off" in rules
    assert not re.search(r"[>#][0-9a-zA-Z]", rules), "a password or its hash"
    assert compose["services"]["redis"]["environment"]["REDIS_PASSWORD"].startswith("${")


@pytest.fixture
def guarded_url(broker_binary: BrokerBinary) -> Iterator[str]:
    """A server started by the script of the container, with its configuration and its users."""
    with tempfile.TemporaryDirectory(prefix="forebay-test-") as folder:
        directory = Path(folder)
        programs = directory / "bin"
        programs.mkdir()
        (programs / "redis-server").symlink_to(broker_binary.path)
        socket = directory / "s"
        options = shlex.split(f"--port 0 --unixsocket {socket}")
        server = subprocess.Popen(
            command_line(["sh", str(DEPLOY / "start-redis.sh"), *options]),
            env={
                "PATH": f"{programs}:{os.environ['PATH']}",
                "REDIS_PASSWORD": PASSWORD,
                "DATA_DIR": str(directory),
                "USERS_FILE": str(directory / "users.acl"),
            },
            stdout=subprocess.DEVNULL,
        )
        try:
            assert wait_until(socket.exists), f"exit status {server.poll()}"
            yield f"unix://forebay:{PASSWORD}@{socket}"
        finally:
            server.terminate()
            server.wait(timeout=10)


async def test_the_user_of_the_pipeline_can_do_its_work(guarded_url: str) -> None:
    async with Producer(guarded_url) as producer:
        handle = await producer.submit("Hello")
        await handle.cancel()
        assert (await handle.outcome()).state == "cancelled"
    assert (await fleet_status(guarded_url, "forebay")).groups == ()


def test_nobody_else_can_do_anything_and_that_user_nothing_else(guarded_url: str) -> None:
    with (
        redis.Redis.from_url(guarded_url.replace(f"forebay:{PASSWORD}@", "")) as stranger,
        pytest.raises(redis.AuthenticationError),
    ):
        stranger.ping()
    with redis.Redis.from_url(guarded_url) as client:
        for command in (
            "FLUSHALL",
            "CONFIG GET *",
            "KEYS *",
            "SHUTDOWN",
            "ACL LIST",
        ):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command.split())
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.set("other", "value")


def test_the_options_of_a_service_are_the_fields_of_its_settings() -> None:
    @settings_options(SchedulerSettings)
    def command(**_: object) -> None: ...

    options = {option.name for option in click.command()(command).params}
    assert options == set(SchedulerSettings.model_fields)


def interpolate(value: str) -> str:
    """What compose makes of `${NAME:-default}` and `${NAME:?message}`."""
    return re.sub(
        r"\$\{\w+:([-?])([^}]*)\}", lambda m: m[2] if m[1] == "-" else "password", str(value)
    )
