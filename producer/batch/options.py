"""What a batch run is asked to do."""

from __future__ import annotations

from dataclasses import dataclass

from wire.errors import ConfigError
from wire.messages import DEFAULT_TENANT


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """A batch run: `input` and `output` are paths, or "-" for standard input and output.

    Rows without an answer go to `errors`, or to the output among the others if it is None.
    The run goes on from what these files hold: rows that have ended, answered or failed, are not
    run again. `restart` empties the files first and runs all rows; `retry_failed` takes the failed
    ones out and runs those again. `max_in_flight` bounds the requests that wait or run at a time,
    `max_line_bytes` what one input line may hold.
    """

    input: str
    output: str
    errors: str | None = None
    restart: bool = False
    retry_failed: bool = False
    max_in_flight: int = 256
    max_line_bytes: int = 8 * 1024 * 1024
    tenant: str = DEFAULT_TENANT

    def __post_init__(self) -> None:
        """Raise ConfigError for a bound below 1, or for two ways of starting."""
        for name in ("max_in_flight", "max_line_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.restart and self.retry_failed:
            raise ConfigError(
                "--restart runs all rows again, --retry-failed those that failed: give one of them"
            )
