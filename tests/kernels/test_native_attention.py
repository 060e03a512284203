"""The compiled attention equals the plain reference on every mix of shapes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cache.page_formats import BFLOAT16, PAGE_FORMATS, PageFormat
from gpu_worker.attention.native import NativeAttention
from gpu_worker.attention.reference import ReferenceAttention
from gpu_worker.kernels import library
from support.attention_steps import AttentionCase, make_case
from support.random_pages import write_blocks, write_slots

pytestmark = pytest.mark.skipif(library.isa() is None, reason="no compiled kernels here")

BACKEND = NativeAttention()  # one for all, as its memory serves one step after the other

EVEN = (0, 0, 0, 1, 1, 1, 2, 2, 2)
UNEVEN = (0, 0, 0, 1, 1)  # a key/value head that serves fewer query heads than its neighbour
ONE_FOR_MANY = (0,) * 11
ONE_EACH = (0, 1, 2)

MIXED = ((1, 100), (1, 3), (7, 30), (5, 0), (1, 700), (100, 200))
SHARED = ((1, 500), (1, 501), (1, 600), (1, 300), (3, 490), (40, 400), (1, 495), (1, 480))


@pytest.fixture(params=[1, 2], autouse=True)
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    library.set_num_threads(request.param)
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the reference's many small products are slower with more
    yield request.param
    torch.set_num_threads(torch_threads)
    library.set_num_threads(1)


LEVELS = {"avx512": 1, "amx": 3}


@pytest.fixture(params=LEVELS)
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each set of instructions that has an attention of its own, where the processor has it."""
    loaded = library.load()
    assert loaded is not None
    shared_object, isa = loaded
    if request.param == "amx" and isa != "amx":
        pytest.skip("no AMX here")
    shared_object.fb_initialize(LEVELS[request.param])
    yield request.param
    shared_object.fb_initialize(LEVELS.get(isa, 1))


def native(case: AttentionCase) -> Tensor:
    attend = BACKEND(case.plan, case.pages)
    return attend(case.query, case.pages.layer(1), case.heads, case.scale)


def reference(case: AttentionCase) -> Tensor:
    attend = ReferenceAttention(case.plan, case.pages)
    return attend(case.query, case.pages.layer(1), case.heads, case.scale)


def assert_equals_reference(case: AttentionCase) -> None:
    # Pages hold the same numbers for both; only the order of float32 sums differs.
    torch.testing.assert_close(native(case), reference(case), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("form", PAGE_FORMATS.values(), ids=PAGE_FORMATS)
@pytest.mark.parametrize("kv_head_of_query", [EVEN, UNEVEN, ONE_FOR_MANY, ONE_EACH])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.usefixtures("instructions")
def test_equals_the_reference_for_each_number_format_and_map_of_heads(
    form: PageFormat, kv_head_of_query: tuple[int, ...], head_dim: int
) -> None:
    assert_equals_reference(
        make_case(MIXED, kv_head_of_query=kv_head_of_query, head_dim=head_dim, form=form)
    )


@pytest.mark.parametrize("head_dim", [2, 8, 16, 48, 80, 112, 192, 256])
def test_equals_the_reference_for_any_even_head_dim(head_dim: int) -> None:
    assert_equals_reference(make_case(MIXED[:4], head_dim=head_dim, form=BFLOAT16))


@pytest.mark.parametrize("block_size", [1, 8, 16, 32, 48])
@pytest.mark.parametrize("sequences", [MIXED, SHARED])
@pytest.mark.usefixtures("instructions")
def test_equals_the_reference_for_any_block_size(
    block_size: int, sequences: tuple[tuple[int, int], ...]
) -> None:
    assert_equals_reference(
        make_case(sequences, block_size=block_size, num_shared=480, form=BFLOAT16)
    )


@settings(max_examples=20, deadline=None)
@given(
    sequences=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 300)), min_size=1, max_size=6),
    num_decodes=st.integers(0, 6),
    kv_head_of_query=st.sampled_from((EVEN, UNEVEN, ONE_EACH, (0, 1, 1, 1))),
    block_size=st.sampled_from((1, 4, 16)),
    num_shared=st.sampled_from((0, 130, 256)),
    seed=st.integers(0, 1000),
)
def test_equals_the_reference_on_any_mix_of_prefill_decode_and_shared_prefixes(
    sequences: list[tuple[int, int]],
    num_decodes: int,
    kv_head_of_query: tuple[int, ...],
    block_size: int,
    num_shared: int,
    seed: int,
) -> None:
    decodes = [(1, 200 + 37 * i) for i in range(num_decodes)]
    assert_equals_reference(
        make_case(
            sequences + decodes,
            kv_head_of_query=kv_head_of_query,
            head_dim=16,
            block_size=block_size,
            num_shared=num_shared,
            seed=seed,
        )
    )


def test_a_long_context_is_shared_out_among_threads(num_threads: int) -> None:
    case = make_case([(1, 9000)])
    assert_equals_reference(case)
    assert BACKEND.num_items == (1 if num_threads == 1 else 6)


def test_sequences_with_the_same_prefix_read_it_once(num_threads: int) -> None:
    case = make_case([(1, 1000 + i) for i in range(10)], num_shared=960)
    assert_equals_reference(case)
    if num_threads == 1:  # else what they share is cut up once more
        # One item for what they share, and one for what each has of its own.
        assert BACKEND.num_items == 11


def test_rows_of_the_query_may_stand_apart() -> None:
    case = make_case(MIXED)
    wide = torch.randn(len(case.query), 15 * 64)
    wide[:, : 9 * 64] = case.query.flatten(1)
    view = wide.view(len(wide), 15, 64)[:, :9]
    attend = BACKEND(case.plan, case.pages)
    found = attend(view, case.pages.layer(1), case.heads, case.scale)
    torch.testing.assert_close(found, reference(case), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("form", PAGE_FORMATS.values(), ids=PAGE_FORMATS)
@pytest.mark.usefixtures("instructions")
def test_a_sequence_does_not_see_slots_beyond_its_context(form: PageFormat) -> None:
    case = make_case([(1, 4), (1, 29), (2, 4), (30, 5)], form=form)
    before = native(case)
    for seq, context_len in enumerate(case.plan.context_lens.tolist()):
        last = int(case.blocks_of(seq)[-1])
        beyond = torch.arange(last * 16 + context_len % 16, (last + 1) * 16)
        write_slots(case.pages, beyond, torch.nan)
    torch.testing.assert_close(native(case), before, rtol=0, atol=0)


@pytest.mark.parametrize("victim", [0, 2, 4])  # a decode, one without a prefix, a prefill
@pytest.mark.parametrize("form", PAGE_FORMATS.values(), ids=PAGE_FORMATS)
@pytest.mark.usefixtures("instructions")
def test_a_sequence_whose_numbers_went_bad_spoils_no_other(victim: int, form: PageFormat) -> None:
    sequences = [(1, 330), (1, 304), (1, 29), (3, 310), (40, 304), (1, 400)]
    case = make_case(sequences, num_shared=288, form=form)
    before = native(case)
    # Only what it shares with no other; the third one shares a block, for it is short.
    own = case.blocks_of(victim)[1 if victim == 2 else 288 // 16 :]
    write_blocks(case.pages, own, torch.nan)
    after = native(case)
    spoilt = case.rows_of(victim)
    assert after[spoilt].isnan().all()
    others = torch.ones(len(after), dtype=torch.bool)
    others[spoilt] = False
    torch.testing.assert_close(after[others], before[others], rtol=0, atol=0)


def test_one_key_may_get_nearly_all_the_weight() -> None:
    case = make_case([(1, 200), (50, 100)])
    case.query.mul_(60.0)
    # Scores of several hundreds are known to a few 1e-5, and so are the weights.
    torch.testing.assert_close(native(case), reference(case), rtol=2e-4, atol=2e-4)


def test_each_step_gives_the_same_bits_again() -> None:
    case = make_case(SHARED, num_shared=480, form=BFLOAT16)
    torch.testing.assert_close(native(case), native(case), rtol=0, atol=0)
