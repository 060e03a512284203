"""The prefix cache over two memories: what goes where, and that nobody reads anything else."""

from __future__ import annotations

from support.tier_memory import TierMemory, chain, contents

ABC = [1, 2, 3]


def tiers_of(memory: TierMemory, letters: list[int]) -> list[str]:
    return [memory.told.get(block_hash, "gone") for block_hash in chain(letters)]


def fill_up(memory: TierMemory, *letters: int) -> None:
    """Sequences of one block that come and go."""
    for letter in letters:
        memory.cache.free(memory.run([letter]))


def test_what_is_evicted_goes_to_host_memory_last_block_first_and_comes_back_whole() -> None:
    memory = TierMemory(num_blocks=3, num_slots=4)
    memory.cache.free(memory.run(ABC))
    fill_up(memory, 7, 8)
    assert tiers_of(memory, ABC) == ["device", "host", "host"]
    assert memory.num_copies_out == 2
    found = memory.cache.find_prefix(chain(ABC))
    assert (len(found.block_ids), len(found.slots)) == (1, 2)
    memory.cache.free(memory.run(ABC))
    assert memory.num_copies_in == 2
    assert tiers_of(memory, ABC) == ["device"] * 3
    assert tiers_of(memory, [7]) == tiers_of(memory, [8]) == ["host"]


def test_host_memory_gives_up_what_was_used_least_recently_leaves_first() -> None:
    memory = TierMemory(num_blocks=3, num_slots=2)
    memory.cache.free(memory.run(ABC))
    fill_up(memory, 5, 6, 7)
    assert tiers_of(memory, ABC) == ["host", "host", "gone"]
    fill_up(memory, 8)
    assert tiers_of(memory, ABC) == ["host", "gone", "gone"]
    assert tiers_of(memory, [5]) == ["host"]


def test_without_host_memory_what_is_evicted_is_gone() -> None:
    memory = TierMemory(num_blocks=2, num_slots=0)
    memory.cache.free(memory.run([1, 2]))
    fill_up(memory, 5)
    assert tiers_of(memory, [1, 2]) == ["device", "gone"]
    assert memory.num_copies_out == 0


def test_a_slot_that_a_plan_reads_is_not_given_to_what_the_same_plan_evicts() -> None:
    memory = TierMemory(num_blocks=2, num_slots=1)
    memory.cache.free(memory.run([1, 2]))
    fill_up(memory, 5)
    assert tiers_of(memory, [1, 2]) == ["device", "host"]
    # Bringing the second block back evicts [5], for which no slot is left.
    memory.cache.free(memory.run([1, 2]))
    assert tiers_of(memory, [1, 2]) == ["device", "device"]
    assert tiers_of(memory, [5]) == ["gone"]


def test_what_is_evicted_and_found_again_in_one_plan_goes_there_and_back() -> None:
    memory = TierMemory(num_blocks=4, num_slots=4)
    memory.cache.free(memory.run([1, 2]))
    memory.cache.free(memory.run([5, 6]))
    first = memory.admit([7])
    again = memory.admit([1, 2])
    assert memory.cache.device.num_free == 1
    memory.copy()
    memory.compute([7], first)
    memory.compute([1, 2], again)
    assert (memory.num_copies_out, memory.num_copies_in) == (2, 1)


def test_a_slot_filled_and_given_up_in_one_plan_is_filled_once() -> None:
    memory = TierMemory(num_blocks=3, num_slots=1)
    memory.cache.free(memory.run(ABC))
    table = memory.admit([5, 6, 7])
    memory.copy()
    assert memory.num_copies_out == 1
    memory.compute([5, 6, 7], table)
    memory.listen()
    assert tiers_of(memory, ABC) == ["host", "gone", "gone"]
    assert memory.slots[0] == contents(ABC)[0]


def test_contents_computed_again_on_the_device_free_their_slot() -> None:
    memory = TierMemory(num_blocks=4, num_slots=2)
    first, second = memory.admit([1]), memory.admit([1])
    memory.copy()
    memory.compute([1], first)
    memory.cache.free(first)
    fill_up(memory, 5, 6, 7)
    assert tiers_of(memory, [1]) == ["host"]
    memory.compute([1], second)
    memory.listen()
    assert tiers_of(memory, [1]) == ["device"]
    memory.cache.check_integrity([second])


def test_a_second_copy_of_known_contents_gives_way_to_the_first() -> None:
    memory = TierMemory(num_blocks=4, num_slots=0)
    first, second = memory.admit([1]), memory.admit([1])
    memory.compute([1], first)
    memory.compute([1], second)
    assert first == second
    assert memory.cache.device.num_free == 3
    memory.cache.check_integrity([first, second])


def test_what_is_forgotten_is_found_by_nobody_with_all_that_continues_it_in_both_memories() -> None:
    memory = TierMemory(num_blocks=3, num_slots=4)
    memory.cache.free(memory.run(ABC))
    fill_up(memory, 5, 6)
    table = memory.run([1])
    assert tiers_of(memory, ABC) == ["device", "host", "host"]
    memory.cache.forget(table)
    memory.listen()
    assert tiers_of(memory, ABC) == ["gone"] * 3
    assert tiers_of(memory, [5]) == ["device"]
    memory.cache.check_integrity([table])
    second = memory.cache.grow(1) or []
    assert memory.cache.register(second[0], chain(ABC)[1], table[0]) == second[0]
    assert memory.cache.find_prefix(chain(ABC)).num_blocks == 0, "nor is what continues it later"


def test_what_sequences_wait_for_is_evicted_last_from_either_memory() -> None:
    memory = TierMemory(num_blocks=2, num_slots=2)
    memory.cache.free(memory.run([1, 2]))
    memory.cache.want(chain([1, 2]))
    fill_up(memory, 5, 6, 7, 8)
    assert tiers_of(memory, [1, 2]) == ["device", "host"]
    memory.cache.unwant(chain([1, 2]))
    memory.cache.check_integrity([])
    fill_up(memory, 5, 6, 7, 8)
    assert tiers_of(memory, [1, 2]) == ["gone", "gone"]


def test_what_was_found_again_is_kept_longer_in_host_memory_too() -> None:
    memory = TierMemory(num_blocks=1, num_slots=2)
    fill_up(memory, 1, 1, 5, 6, 7)
    assert tiers_of(memory, [1]) == ["host"]
    assert tiers_of(memory, [5]) == ["gone"]


# Between groups


def test_a_pinned_prefix_is_copied_by_the_next_plan_and_survives_eviction() -> None:
    memory = TierMemory(num_blocks=3, num_slots=4)
    memory.cache.free(memory.run(ABC))
    fill_up(memory, 5)
    slots = memory.cache.pin(chain([*ABC, 4]))
    assert len(slots) == 3
    assert memory.cache.num_ready(slots) == 0
    assert memory.cache.has_copies
    memory.copy()
    assert memory.cache.num_ready(slots) == 3
    assert [memory.slots[slot] for slot in slots] == contents(ABC)
    num_copies = memory.num_copies_out
    fill_up(memory, 6, 7, 8)
    assert tiers_of(memory, ABC) == ["host"] * 3
    assert memory.num_copies_out == num_copies + 1, "what is pinned was there already"
    assert [memory.slots[slot] for slot in slots] == contents(ABC)
    memory.cache.unpin(slots)
    memory.cache.check_integrity([])


def test_a_pin_is_as_long_as_there_is_room_for_it() -> None:
    memory = TierMemory(num_blocks=3, num_slots=2)
    memory.cache.free(memory.run(ABC))
    slots = memory.cache.pin(chain(ABC))
    assert len(slots) == 2
    assert memory.cache.pin(chain([9])) == []
    memory.cache.unpin(slots)
    memory.cache.check_integrity([])
    assert memory.cache.host.num_free == 2
    assert not memory.cache.has_copies, "nobody waits for them any more"


def test_pinned_contents_that_are_found_to_be_no_good_are_not_ready() -> None:
    memory = TierMemory(num_blocks=3, num_slots=3)
    table = memory.run(ABC)
    slots = memory.cache.pin(chain(ABC))
    memory.copy()
    memory.cache.forget(table[1:])
    assert memory.cache.num_ready(slots) == 1
    memory.cache.unpin(slots)
    memory.cache.check_integrity([table])


def receive(memory: TierMemory, slots: list[int], letters: list[int]) -> None:
    for slot, received in zip(slots, contents(letters)[-len(slots) :], strict=True):
        memory.slots[slot] = received


def test_what_was_received_is_found_and_comes_in_with_the_sequence_that_uses_it() -> None:
    memory = TierMemory(num_blocks=4, num_slots=4)
    memory.cache.free(memory.run([1]))
    slots = memory.cache.reserve(2) or []
    receive(memory, slots, ABC)
    assert memory.cache.find_prefix(chain(ABC)).num_blocks == 1, "not before it is adopted"
    assert memory.cache.adopt(chain(ABC), slots)
    memory.listen()
    assert tiers_of(memory, ABC) == ["device", "host", "host"]
    memory.cache.check_integrity([])
    memory.cache.free(memory.run(ABC))
    assert memory.num_copies_in == 2
    memory.cache.check_integrity([])


def test_what_was_received_behind_a_prefix_that_is_gone_is_lost() -> None:
    memory = TierMemory(num_blocks=2, num_slots=4)
    slots = memory.cache.reserve(2) or []
    receive(memory, slots, ABC)
    assert not memory.cache.adopt(chain(ABC), slots)
    memory.listen()
    assert not memory.told
    assert memory.cache.host.num_free == 4
    memory.cache.check_integrity([])


def test_what_was_computed_while_it_was_received_is_cached_once() -> None:
    memory = TierMemory(num_blocks=4, num_slots=4)
    slots = memory.cache.reserve(3) or []
    receive(memory, slots, ABC)
    memory.cache.free(memory.run([1, 2]))
    assert memory.cache.adopt(chain(ABC), slots)
    memory.listen()
    assert tiers_of(memory, ABC) == ["device", "device", "host"]
    memory.cache.check_integrity([])


def test_room_to_receive_into_is_what_was_used_least_recently_and_is_given_back() -> None:
    memory = TierMemory(num_blocks=1, num_slots=2)
    fill_up(memory, 5, 6, 7)
    assert memory.cache.reserve(3) is None
    slots = memory.cache.reserve(1) or []
    memory.listen()
    assert tiers_of(memory, [5]) == ["gone"]
    assert tiers_of(memory, [6]) == ["host"]
    memory.cache.unpin(slots)
    assert memory.cache.host.num_free == 2
