"""Where the pipeline on this machine can be reached."""

from __future__ import annotations

from forebay.paths import socket_path
from service.settings import LocalSettings
from wire.errors import ServerUnreachable


def local_url() -> str:
    """The server of this machine's pipeline, for `Producer` and `Consumer`.

    That is FOREBAY_REDIS_URL if it is set, else the server of `forebay up`. Raises
    ServerUnreachable when there is neither, ConfigError when a setting cannot be used.
    """
    return server_url(LocalSettings.load())


def server_url(settings: LocalSettings) -> str:
    """The server that `settings` name, else that of `forebay up`. Raises ServerUnreachable."""
    if "redis_url" in settings.model_fields_set:
        return settings.redis_url.get_secret_value()
    socket = socket_path(settings.resolved_state_dir)
    if not socket.exists():
        raise ServerUnreachable(
            f"no `forebay up` is running here (there is no {socket}); start one, or name a server "
            "with --redis or FOREBAY_REDIS_URL"
        )
    return f"unix://{socket}"
