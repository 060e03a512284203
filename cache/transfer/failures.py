"""The one thing that can come of a transfer other than its blocks."""

from __future__ import annotations

from typing import ClassVar

from wire.errors import ForebayError


class TransferFailed(ForebayError):
    """The blocks cannot be had from there; they can still be computed."""

    code: ClassVar[str] = "transfer_failed"
