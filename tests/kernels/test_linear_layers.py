"""Products by packed weights, against float64 and against the fallback in torch's operations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpu_worker.kernels import library
from gpu_worker.kernels.linear import Layout, PackedLinear, WeightFormat
from gpu_worker.layers.quantized import Int4Product, Int8Product, hadamard

pytestmark = pytest.mark.skipif(library.isa() is None, reason="needs AVX-512 and the kernels")

TILES = [
    pytest.param(
        WeightFormat(Layout.BFLOAT16_TILES, num_terms),
        tolerance,
        marks=pytest.mark.skipif(library.isa() != "amx", reason="needs AMX"),
    )
    for num_terms, tolerance in ((1, 2e-2), (2, 1e-4), (3, 1e-5))
]
FORMATS = [
    (WeightFormat(Layout.FLOAT32_PANELS), 1e-5),
    (WeightFormat(Layout.BFLOAT16_PANELS), 1e-5),
    *TILES,
    (WeightFormat(Layout.INT16_GROUPS), 3e-3),
    (WeightFormat(Layout.INT8_GROUPS), 1e-1),
    (WeightFormat(Layout.INT4_GROUPS), 6e-1),
]
"""Formats, and the largest error of a standard normal output: the rounding of the activations, and
of the weights where they are rounded to a group's scale."""


@pytest.fixture(params=[1, 2], autouse=True)
def num_threads(request: pytest.FixtureRequest) -> int:
    library.set_num_threads(request.param)
    return int(request.param)


def exact(values: Tensor, weight: Tensor, weight_format: WeightFormat) -> Tensor:
    if weight_format.layout in (Layout.BFLOAT16_PANELS, Layout.BFLOAT16_TILES):
        weight = weight.bfloat16()
    return values.double() @ weight.double().T


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("weight_format", "tolerance"), FORMATS)
@pytest.mark.parametrize("num_rows", [1, 7, 16, 33, 140])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(192, 576), (70, 100), (1, 3)])
def test_a_product_is_as_close_as_its_numbers_allow(
    weight_format: WeightFormat,
    tolerance: float,
    num_rows: int,
    num_outputs: int,
    num_inputs: int,
) -> None:
    weight = normal(num_outputs, num_inputs) / num_inputs**0.5
    bias = normal(num_outputs, seed=1)
    values = normal(num_rows, num_inputs, seed=2)
    product = PackedLinear(weight, weight_format, bias)(values)
    expected = exact(values, weight, weight_format) + bias
    assert (product - expected).abs().max() < tolerance


@pytest.mark.parametrize(("weight_format", "tolerance"), FORMATS)
@pytest.mark.parametrize("num_outputs", [96, 20])
def test_a_gated_product_is_silu_of_the_gates_times_the_ups(
    weight_format: WeightFormat, tolerance: float, num_outputs: int
) -> None:
    weight = normal(2 * num_outputs, 128) / 128**0.5
    values = normal(37, 128, seed=1)
    product = PackedLinear(weight, weight_format, gated=True)(values)
    gates, ups = exact(values, weight, weight_format).chunk(2, dim=1)
    assert product.shape == (37, num_outputs)
    assert (product - torch.nn.functional.silu(gates) * ups).abs().max() < 4 * tolerance


def silu_of(gates: Tensor) -> Tensor:
    """What a gated layer makes of `gates` (n,) with ups of 1."""
    layer = PackedLinear(torch.eye(2), WeightFormat(Layout.FLOAT32_PANELS), gated=True)
    return layer(torch.stack((gates, torch.ones_like(gates)), dim=1))[:, 0]


def test_the_activation_is_off_by_units_in_the_last_place_only() -> None:
    gates = torch.cat((torch.linspace(-86, 86, 200_000), torch.logspace(-30, 0, 2000)))
    expected = torch.nn.functional.silu(gates.double())
    error = ((silu_of(gates).double() - expected) / expected).nan_to_num(0.0).abs().max()
    assert error < 2.5 * torch.finfo(torch.float32).eps


def test_the_activation_of_extreme_gates() -> None:
    found = silu_of(torch.tensor([-1e30, -200.0, 200.0]))
    assert abs(found[1]) < 1e-34
    assert found[2] == 200.0
    assert found[0].abs() < 1e-6  # e^87 is the most that the kernel divides by


@pytest.mark.parametrize(("weight_format", "tolerance"), FORMATS)
def test_a_row_that_is_not_finite_spoils_no_other(
    weight_format: WeightFormat, tolerance: float
) -> None:
    values = normal(20, 128)
    linear = PackedLinear(normal(48, 128, seed=1) / 128**0.5, weight_format)
    clean = linear(values)
    for bad in (torch.nan, torch.inf):
        values[9, 70] = bad
        product = linear(values)
        assert not product[9].isfinite().any()
        others = torch.arange(20) != 9
        assert torch.equal(product[others], clean[others])


@pytest.mark.parametrize(("weight_format", "tolerance"), FORMATS)
def test_an_outcome_depends_on_its_own_row_alone(
    weight_format: WeightFormat, tolerance: float
) -> None:
    values = normal(50, 192)
    linear = PackedLinear(normal(100, 192, seed=1), weight_format)
    together = linear(values)
    for first, last in ((0, 1), (1, 6), (6, 20), (20, 50)):
        assert torch.equal(linear(values[first:last]), together[first:last])


@pytest.mark.parametrize("layout", [Layout.INT8_GROUPS, Layout.INT16_GROUPS])
def test_integer_products_over_parts_of_the_inputs_add_up_to_the_whole(layout: Layout) -> None:
    weight, values = normal(64, 320), normal(10, 320, seed=1)
    whole = PackedLinear(weight, WeightFormat(layout))(values)
    parts = sum(
        PackedLinear(weight[:, cut], WeightFormat(layout))(values[:, cut].contiguous())
        for cut in (slice(0, 192), slice(192, 320))
    )
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(library.isa() != "amx", reason="compares AMX with VNNI")
def test_int8_gives_the_same_numbers_on_both_instruction_sets() -> None:
    linear = PackedLinear(normal(96, 200), WeightFormat(Layout.INT8_GROUPS))
    values = normal(21, 200, seed=1)
    on_tiles = linear(values)
    loaded = library.load()
    assert loaded is not None
    loaded[0].fb_initialize(1)
    try:
        torch.testing.assert_close(linear(values), on_tiles, rtol=1e-6, atol=1e-6)
    finally:
        loaded[0].fb_initialize(2)


@pytest.mark.parametrize(
    ("layout", "fallback"),
    [(Layout.INT8_GROUPS, Int8Product), (Layout.INT4_GROUPS, Int4Product)],
)
def test_quantized_weights_are_those_of_the_fallback(
    layout: Layout, fallback: type[Int8Product | Int4Product]
) -> None:
    weight = normal(48, 224)
    on_torch = fallback(weight, None, torch.float32)(torch.eye(224))
    # A row of one value in zeros is quantized without an error, also when its group is mixed.
    on_kernels = PackedLinear(weight, WeightFormat(layout))(torch.eye(224))
    torch.testing.assert_close(on_kernels, on_torch, rtol=1e-5, atol=1e-5)


def test_weights_that_were_made_of_4_bits_lose_nothing() -> None:
    steps = torch.randint(0, 16, (64, 8, 32), generator=torch.Generator().manual_seed(3)).float()
    steps[..., 0], steps[..., 1] = 0, 15
    scales = normal(64, 8, 1, seed=4).abs().half().float()
    minima = normal(64, 8, 1, seed=5).half().float()
    weight = (steps * scales + minima).flatten(1)
    product = PackedLinear(weight, WeightFormat(Layout.INT4_GROUPS))(torch.eye(256)).T
    torch.testing.assert_close(product, weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("weight_format", [f[0] for f in FORMATS if type(f) is tuple])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_are_packed_out_of_any_type_and_any_rows(
    weight_format: WeightFormat, dtype: torch.dtype
) -> None:
    stored = normal(60, 300).to(dtype)[:, 50:170]
    values = normal(3, 120, seed=1)
    plain = PackedLinear(stored.float().contiguous(), weight_format)
    assert torch.equal(PackedLinear(stored, weight_format)(values), plain(values))


def test_no_rows_make_no_outputs() -> None:
    linear = PackedLinear(normal(40, 64), WeightFormat(Layout.FLOAT32_PANELS))
    assert linear(torch.empty(0, 64)).shape == (0, 40)


def test_mixing_twice_gives_back_what_was_mixed() -> None:
    torch.testing.assert_close(hadamard(64) @ hadamard(64), 64 * torch.eye(64))
