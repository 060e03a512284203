"""Random lives of a prefix cache over two memories, whose contents are checked at every read."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from support.tier_memory import TierMemory, chain, contents
from wire.ids import BlockHash

LETTERS = st.lists(st.integers(0, 1), min_size=1, max_size=5)
"""Two letters, so that prefixes are shared often."""


class Lives(RuleBasedStateMachine):
    """Sequences come, wait, share, fail and end; prefixes are pinned, received and dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = TierMemory(num_blocks=8, num_slots=5)
        self.running: list[tuple[list[int], list[int]]] = []  # letters and block table
        self.waiting: list[list[int]] = []
        self.pins: list[tuple[list[int], list[int]]] = []  # letters and slots
        self.receiving: list[tuple[list[int], list[int], bool]] = []

    @rule(letters=LETTERS)
    def wait(self, letters: list[int]) -> None:
        self.waiting.append(letters)
        self.memory.cache.want(chain(letters))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def give_up_waiting(self, data: st.DataObject) -> None:
        letters = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(letters)
        self.memory.cache.unwant(chain(letters))

    @rule(count=st.integers(0, 3), share=st.floats(0, 1))
    def step(self, count: int, share: float) -> None:
        """Admit as many as there is room for, copy, then compute the new ones in part or whole."""
        cache, admitted = self.memory.cache, []
        for letters in self.waiting[:count]:
            found = cache.find_prefix(chain(letters))
            num_new = len(letters) - len(found.block_ids)
            if cache.device.num_free - cache.device.num_free_among(found.block_ids) < num_new:
                break
            admitted.append((letters, cache.hold(found, len(letters)), found.num_blocks))
            cache.unwant(chain(letters))
        self.waiting = self.waiting[len(admitted) :]
        self.memory.copy()
        for letters, table, num_found in admitted:
            held = [self.memory.blocks[block_id] for block_id in table[:num_found]]
            assert held == contents(letters)[:num_found], "what was found is there after the copies"
            num_computed = max(num_found, round(share * len(letters)))
            part = table[:num_computed]
            self.memory.compute(letters[:num_computed], part)
            self.running.append((letters, part + table[num_computed:]))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), fails=st.booleans())
    def end(self, data: st.DataObject, fails: bool) -> None:
        """Also half-computed ones end, as when they are aborted or preempted."""
        index = data.draw(st.integers(0, len(self.running) - 1))
        _, table = self.running.pop(index)
        if fails:
            self.memory.cache.forget(table)
        self.memory.cache.free(table)

    @rule(letters=LETTERS)
    def pin(self, letters: list[int]) -> None:
        slots = self.memory.cache.pin(chain(letters))
        self.pins.append((letters[: len(slots)], slots))

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.pins) - 1))
        self.memory.cache.unpin(self.pins.pop(index)[1])

    @rule(letters=LETTERS, data=st.data())
    def receive(self, letters: list[int], data: st.DataObject) -> None:
        slots = self.memory.cache.reserve(data.draw(st.integers(1, len(letters))))
        if slots is not None:
            for slot, received in zip(slots, contents(letters)[-len(slots) :], strict=True):
                self.memory.slots[slot] = received
            self.receiving.append((letters, slots, data.draw(st.booleans())))

    @precondition(lambda self: self.receiving)
    @rule(data=st.data())
    def end_receiving(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.receiving) - 1))
        letters, slots, is_good = self.receiving.pop(index)
        if is_good:
            known = self.memory.cache.find_prefix(chain(letters)).num_blocks
            is_rooted = known >= len(letters) - len(slots)
            assert self.memory.cache.adopt(chain(letters), slots) == is_rooted
        else:
            self.memory.cache.unpin(slots)

    @invariant()
    def nothing_leaks(self) -> None:
        self.memory.cache.check_integrity(table for _, table in self.running)
        held = {slot for _, slots in self.pins for slot in slots}
        held.update(slot for _, slots, _ in self.receiving for slot in slots)
        assert self.memory.cache.host.num_held == len(held)

    @invariant()
    def what_is_told_is_so(self) -> None:
        self.memory.listen()
        cache = self.memory.cache
        device, host = cache.device.names(), cache.host.names()
        told: dict[BlockHash, str] = dict.fromkeys(host - device, "host")
        told.update(dict.fromkeys(device, "device"))
        assert self.memory.told == told

    @invariant()
    def what_is_pinned_is_there_once_it_was_copied(self) -> None:
        for letters, slots in self.pins:
            num_ready = self.memory.cache.num_ready(slots)
            sent = [self.memory.slots[slot] for slot in slots[:num_ready]]
            assert sent == contents(letters)[:num_ready]

    def teardown(self) -> None:
        """When all have let go, everything is free again."""
        for _, table in self.running:
            self.memory.cache.free(table)
        for letters in self.waiting:
            self.memory.cache.unwant(chain(letters))
        for _, slots in self.pins:
            self.memory.cache.unpin(slots)
        for _, slots, _ in self.receiving:
            self.memory.cache.unpin(slots)
        self.memory.cache.check_integrity([])
        assert (self.memory.cache.device.num_held, self.memory.cache.host.num_held) == (0, 0)


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
