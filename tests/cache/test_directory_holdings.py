"""What a group tells the directory: net, numbered, and all of it again where that is needed."""

from __future__ import annotations

from cache.directory import Holdings, split
from wire.scripts import DirectoryUpdate

A, B, C, D = (bytes([number]) * 16 for number in range(4))


def told(holdings: Holdings) -> DirectoryUpdate:
    """The next update, which the directory carries out."""
    update = holdings.next_update()
    assert update is not None
    assert holdings.answered(update, update.number)
    return update


def parts(update: DirectoryUpdate) -> tuple[set[bytes], set[bytes], set[bytes]]:
    return set(split(update.device)), set(split(update.host)), set(split(update.gone))


def test_several_steps_make_one_update_and_only_the_last_place_counts() -> None:
    holdings = Holdings()
    assert not holdings.has_news
    assert holdings.next_update() is None
    holdings.change(A + B + C, b"", b"")
    holdings.change(D, B + C, b"")
    holdings.change(b"", b"", C)
    update = told(holdings)
    assert (update.number, update.reset) == (1, False)
    assert parts(update) == ({A, D}, {B}, {C})
    assert (holdings.device, holdings.host) == ({A, D}, {B})
    assert not holdings.has_news


def test_an_update_stays_the_same_until_it_is_answered() -> None:
    holdings = Holdings()
    holdings.change(A, b"", b"")
    first = holdings.next_update()
    holdings.change(B, b"", b"")
    assert holdings.next_update() is first
    assert told(holdings) is first
    assert parts(told(holdings)) == ({B}, set(), set())


def test_updates_are_bounded() -> None:
    holdings = Holdings(max_changes=3)
    hashes = [bytes([number]) * 16 for number in range(8)]
    holdings.change(b"".join(hashes), b"", b"")
    updates = [told(holdings) for _ in range(3)]
    assert [update.number for update in updates] == [1, 2, 3]
    assert [len(update.device) // 16 for update in updates] == [3, 3, 2]
    assert {block for update in updates for block in split(update.device)} == set(hashes)


def test_after_a_gap_everything_is_told_from_an_empty_entry_on() -> None:
    holdings = Holdings()
    holdings.change(A + B, b"", b"")
    told(holdings)
    holdings.change(C, B, b"")
    update = holdings.next_update()
    assert update is not None
    assert not holdings.answered(update, 0), "the first one is lost"
    again = told(holdings)
    assert again.reset
    assert again.number > update.number
    assert parts(again) == ({A, C}, {B}, set())


def test_numbers_go_on_above_what_the_directory_has() -> None:
    holdings = Holdings()
    holdings.change(A, b"", b"")
    update = holdings.next_update()
    assert update is not None
    assert not holdings.answered(update, 7)
    assert told(holdings).number == 8


def test_a_question_finds_out_whether_the_directory_knows_everything() -> None:
    holdings = Holdings()
    holdings.change(A, b"", b"")
    told(holdings)
    question = holdings.next_update(ask=True)
    assert question == DirectoryUpdate(0)
    assert holdings.answered(question, 1)
    assert holdings.next_update() is None
    question = holdings.next_update(ask=True)
    assert question is not None
    assert not holdings.answered(question, 0)
    assert parts(told(holdings)) == ({A}, set(), set())


def test_a_new_life_begins_with_number_one_and_all_that_is_held() -> None:
    holdings = Holdings()
    holdings.start_life()
    assert not holdings.has_news, "nothing is held, and nothing is known"
    holdings.change(A + B, b"", b"")
    told(holdings)
    unanswered = holdings.next_update(ask=True)
    assert unanswered is not None
    holdings.start_life()
    assert holdings.answered(unanswered, 1), "of the last life: it means nothing"
    update = told(holdings)
    assert (update.number, update.reset) == (1, False)
    assert parts(update) == ({A, B}, set(), set())


def test_what_cannot_be_told_does_not_pile_up() -> None:
    holdings = Holdings(max_untold=4)
    holdings.change(A, b"", b"")
    told(holdings)
    for number in range(100, 120):
        block = bytes([number]) * 16
        holdings.change(block, b"", b"")
        holdings.change(b"", b"", block)
    update = told(holdings)
    assert update.reset
    assert parts(update)[0] == {A}
    assert len(parts(update)[2]) <= 5
