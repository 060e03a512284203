"""Keeping passwords out of what people and log collectors read."""

from __future__ import annotations

import re

_CREDENTIALS = re.compile(r"(?P<scheme>[a-zA-Z][a-zA-Z0-9+.-]*://)(?P<user>[^\s/:@]*):[^\s]*@")
_QUERY_PASSWORD = re.compile(r"(?P<name>[?&](?:password|username)=)[^\s&#]*")


def mask_passwords(text: str) -> str:
    """`text` with the password of every URL in it masked: `redis://user:***@host:6379/0`."""
    # The password runs up to the last @: one that holds an unescaped / or @ is still masked.
    text = _CREDENTIALS.sub(r"\g<scheme>\g<user>:***@", text)
    return _QUERY_PASSWORD.sub(r"\g<name>***", text)
