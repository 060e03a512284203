"""What a group has cached, and what of it the directory has yet to be told. Pure, no connection.

    changes of every step -> Holdings -> numbered updates, one at a time -> the directory

Updates are net: a block that came and went between two of them is told of once. When the directory
answers with another number than expected (it missed an update, or lost its last moments),
everything is told again: the first update empties the entry, it and others fill it. A new life of
the group begins with an empty entry by itself, as its epoch is part of the entry's name. There is
no other kind of snapshot, and nothing is asked of the ranks for one.
"""

from __future__ import annotations

from cache.prefix_hash import HASH_BYTES
from wire.ids import BlockHash
from wire.scripts import DirectoryUpdate

MAX_CHANGES = 1000
"""So many in one update: about a millisecond of the server's time."""

MAX_UNTOLD = 65_536
"""With more changes than this beyond what is held, starting over is the shorter way."""

_DEVICE, _HOST, _GONE = range(3)


class Holdings:
    """The hashes of a group's cached blocks, on the device and in host memory alone."""

    def __init__(self, *, max_changes: int = MAX_CHANGES, max_untold: int = MAX_UNTOLD) -> None:
        self.device: set[BlockHash] = set()
        self.host: set[BlockHash] = set()
        self._max_changes = max_changes
        self._max_untold = max_untold
        self._untold: dict[BlockHash, int] = {}  # where they are now
        self._is_to_reset = False
        self._number = 0
        self._update: DirectoryUpdate | None = None  # not answered yet

    def __len__(self) -> int:
        return len(self.device) + len(self.host)

    @property
    def has_news(self) -> bool:
        """Whether there is something to tell."""
        return bool(self._untold) or self._is_to_reset or self._update is not None

    def change(self, device: bytes, host: bytes, gone: bytes) -> None:
        """Take in what a step changed: hashes in a row, each in one of the three at most."""
        for hashes, now in ((device, _DEVICE), (host, _HOST), (gone, _GONE)):
            if hashes:
                self._move(split(hashes), now)
        if len(self._untold) > len(self) + self._max_untold:
            self.start_over()

    def start_over(self) -> None:
        """Tell everything again, from an empty entry on."""
        self._untold = dict.fromkeys(self.device, _DEVICE) | dict.fromkeys(self.host, _HOST)
        self._is_to_reset = True
        self._update = None

    def start_life(self) -> None:
        """Tell everything under a new epoch, whose entry is empty and takes numbers from 1 on."""
        self.start_over()
        self._is_to_reset = False
        self._number = 0

    def next_update(self, *, ask: bool = False) -> DirectoryUpdate | None:
        """What to tell next: the same until it is `answered`, so that it can be repeated.

        With nothing to tell it is None; or, to `ask`, one that only brings the last number back.
        """
        if self._update is None and self.has_news:
            self._number += 1
            self._update = self._take()
        elif self._update is None and ask:
            self._update = DirectoryUpdate(0)
        return self._update

    def answered(self, update: DirectoryUpdate, last: int) -> bool:
        """The directory has carried out `last` and nothing after it. False: all is told again."""
        if update is not self._update:
            return True  # everything is to be told again already
        self._update = None
        if last == self._number:
            return True
        # With a number below its last one, the directory would take it for a repetition.
        self._number = max(self._number, last)
        self.start_over()
        return False

    def _move(self, blocks: list[BlockHash], now: int) -> None:
        for tier, held in ((_DEVICE, self.device), (_HOST, self.host)):
            if tier == now:
                held.update(blocks)
            elif held:
                held.difference_update(blocks)
        self._untold.update(dict.fromkeys(blocks, now))

    def _take(self) -> DirectoryUpdate:
        taken: tuple[list[BlockHash], ...] = ([], [], [])
        for _ in range(min(self._max_changes, len(self._untold))):
            block, now = self._untold.popitem()
            taken[now].append(block)
        device, host, gone = map(b"".join, taken)
        reset, self._is_to_reset = self._is_to_reset, False
        return DirectoryUpdate(self._number, reset, device, host, gone)


def split(hashes: bytes) -> list[BlockHash]:
    """Hashes in a row, one by one."""
    return [
        BlockHash(hashes[start : start + HASH_BYTES]) for start in range(0, len(hashes), HASH_BYTES)
    ]
