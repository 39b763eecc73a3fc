"""Encoding of one weight: distortion, importance, stored orders and awkward tensors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jlcm.budget import Allocation
from jlcm.clustering.scalar import METHODS
from jlcm.config import ENCODINGS, Encoding, Init
from jlcm.encode import encode, encode_int8, group_count, neuron_order
from jlcm.packed import PackedWeight
from jlcm.packing import order_bytes, packed_bytes

FAST = Init(method="kmeans")


def plan(shape, bits: int, spare: int) -> Allocation:
    rows, columns = shape[0], math.prod(shape[1:])
    return Allocation(
        rows=rows, columns=columns, bits=bits, nbytes=packed_bytes(rows * columns, bits) + spare
    )


def gaussian(*shape, seed: int = 0) -> torch.Tensor:
    return 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def distortion(packed: PackedWeight, weight: torch.Tensor, importance=1.0) -> float:
    return float(((packed().double() - weight.double()).square() * importance).sum())


def nbytes(packed: PackedWeight) -> int:
    return sum(b.numel() * b.element_size() for b in packed.buffers())


@pytest.mark.parametrize("kind", ["multi_scale", "multi_codebook", "per_row", "tiles", "trellis"])
def test_error_falls_with_bits(kind):
    weight = gaussian(32, 96)
    errors = [
        distortion(
            encode(weight, plan(weight.shape, bits, 3000), Encoding(kind=kind), FAST), weight
        )
        for bits in range(1, 7)
    ]
    assert all(b < 0.5 * a for a, b in zip(errors, errors[1:], strict=False))


@pytest.mark.parametrize("kind", ["multi_scale", "multi_codebook"])
def test_error_falls_with_groups(kind):
    # Rows of different spread: more groups fit them better.
    weight = gaussian(64, 64) * torch.logspace(-1, 1, 64)[:, None]
    errors = []
    for groups in (1, 4, 16, 64, 256):
        spare = groups * 8 if kind == "multi_codebook" else 8 + groups * 2
        packed = encode(
            weight, plan(weight.shape, 2, spare), Encoding(kind=kind), FAST, try_stored_order=False
        )
        found = packed.codebooks.shape[0] if kind == "multi_codebook" else packed.scales.numel()
        assert found == groups
        errors.append(distortion(packed, weight))
    assert all(b < a for a, b in zip(errors, errors[1:], strict=False))


def test_scales_are_the_largest_magnitudes_of_flat_groups():
    weight = gaussian(10, 30)
    packed = encode(
        weight, plan(weight.shape, 3, 16 + 7 * 2), Encoding(), FAST, try_stored_order=False
    )
    flat = weight.view(-1).half().float().abs()
    expected = [max(flat[p] for p in range(300) if p * 7 // 300 == g) for g in range(7)]
    assert packed.scales.tolist() == [float(e) for e in expected]
    assert packed.codebooks.abs().max() <= 1


def test_codebooks_see_their_own_group_only():
    weight = torch.cat([gaussian(4, 50), 5 + gaussian(4, 50), -3 + gaussian(4, 50)])
    packed = encode(
        weight,
        plan(weight.shape, 2, 3 * 8),
        Encoding(kind="multi_codebook"),
        FAST,
        try_stored_order=False,
    )
    assert packed.codebooks.shape == (3, 4)
    assert (packed.codebooks.float().mean(1) - torch.tensor([0.0, 5.0, -3.0])).abs().max() < 0.05
    assert (packed.codebooks.diff(dim=1) >= 0).all()


def test_tiles_are_clustered_tile_by_tile():
    level = torch.arange(6.0).view(2, 3)
    weight = level.repeat_interleave(4, 0).repeat_interleave(5, 1)[:7, :13]
    packed = encode(weight, plan(weight.shape, 1, 6 * 4), Encoding(kind="tiles", tile=(4, 5)), FAST)
    assert torch.equal(packed(), weight)
    assert packed.codebooks[:, 0].tolist() == level.view(-1).tolist()


@pytest.mark.parametrize("kind", ["multi_scale", "multi_codebook"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("weighted", [False, True])
def test_auto_is_never_worse_than_either(kind, seed, weighted):
    weight = gaussian(24, 40, seed=seed) * torch.logspace(-1, seed - 1, 24)[:, None]
    importance = torch.rand(24, 40, generator=torch.Generator().manual_seed(seed))
    options = {"importance": importance if weighted else None}
    allocation = plan(weight.shape, 3, 200)
    factor = importance if weighted else 1.0
    auto = distortion(
        encode(weight, allocation, Encoding(kind="auto"), FAST, **options), weight, factor
    )
    one = distortion(
        encode(weight, allocation, Encoding(kind=kind), FAST, **options), weight, factor
    )
    assert auto <= one


@pytest.mark.parametrize("kind", ENCODINGS)
def test_importance_lowers_the_weighted_error(kind):
    weight = gaussian(16, 60)
    importance = torch.rand(16, 60, generator=torch.Generator().manual_seed(1)) ** 8
    allocation = plan(weight.shape, 2, 400)
    encoding = Encoding(kind=kind, tile=(8, 20))
    even = encode(weight, allocation, encoding, FAST)
    weighted = encode(weight, allocation, encoding, FAST, importance=importance)
    assert distortion(weighted, weight, importance) < distortion(even, weight, importance)
    assert distortion(even, weight) < distortion(weighted, weight)


def test_weights_of_no_importance_are_ignored():
    weight = torch.tensor([[1.0, 2.0, 50.0, 77.0, 1.0, 2.0, 91.0, -60.0]])
    importance = torch.tensor([[1.0, 1, 0, 0, 1, 1, 0, 0]])
    packed = encode(
        weight, plan((1, 8), 1, 4), Encoding(kind="multi_codebook"), FAST, importance=importance
    )
    assert packed.codebooks.tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("factor", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_the_ratios_of_importance_matter(factor, refit, dtype):
    weight = gaussian(8, 60)
    importance = torch.rand(8, 60, generator=torch.Generator().manual_seed(1)).to(dtype) + 0.1
    encoding = Encoding(refit_scales=refit)
    one, other = (
        encode(weight, plan(weight.shape, 2, 60), encoding, FAST, importance=importance * f)
        for f in (1.0, factor)
    )
    assert (one() - other()).norm() <= 1e-3 * one().norm()


def test_refitted_scales_lower_the_error():
    weight = gaussian(16, 64)
    allocation = plan(weight.shape, 2, 8 + 2 * 64)
    largest, refitted = (
        distortion(encode(weight, allocation, Encoding(refit_scales=r), FAST), weight)
        for r in (False, True)
    )
    assert refitted < largest


def clustered_rows(kinds: int, rows: int, columns: int) -> torch.Tensor:
    """Rows of a few shapes in random order: sorting them pays."""
    shapes = gaussian(kinds, columns, seed=3) + torch.linspace(-1, 1, kinds)[:, None]
    choice = torch.randint(kinds, (rows,), generator=torch.Generator().manual_seed(4))
    return shapes[choice]


@pytest.mark.parametrize("kind", ["multi_codebook", "tiles"])
def test_stored_order_is_kept_where_it_pays(kind):
    weight = clustered_rows(8, 64, 32)
    encoding = Encoding(kind=kind, tile=(8, 32))
    allocation = plan(weight.shape, 2, 8 * 8 + order_bytes(64))
    packed = encode(weight, allocation, encoding, Init())
    without = encode(weight, allocation, encoding, Init(), try_stored_order=False)
    assert packed.order is not None and without.order is None
    assert distortion(packed, weight) < 0.2 * distortion(without, weight)
    assert nbytes(packed) <= allocation.nbytes


@settings(deadline=None, max_examples=30)
@given(
    st.integers(2, 40),
    st.integers(1, 30),
    st.integers(1, 4),
    st.integers(0, 400),
    st.sampled_from(["multi_scale", "multi_codebook", "tiles", "auto"]),
    st.sampled_from(["gaussian", "zeros", "constant"]),
)
def test_stored_order_is_kept_only_where_it_lowers_the_error(
    rows, columns, bits, spare, kind, content
):
    weight = {
        "gaussian": gaussian(rows, columns),
        "zeros": torch.zeros(rows, columns),
        "constant": torch.full((rows, columns), 0.25),
    }[content]
    encoding = Encoding(kind=kind, tile=(4, 8))
    allocation = plan(weight.shape, bits, spare)
    packed = encode(weight, allocation, encoding, FAST)
    without = encode(weight, allocation, encoding, FAST, try_stored_order=False)
    always = encode(weight, allocation, encoding, FAST, always_store_order=True)
    error, plain = distortion(packed, weight), distortion(without, weight)
    assert error <= plain and without.order is None
    if packed.order is not None:
        assert error < plain
        assert always.order is not None
    if content != "gaussian":
        assert error == 0 and packed.order is None


def awkward() -> dict[str, torch.Tensor]:
    weight = gaussian(12, 18)
    dead = weight.clone()
    dead[[0, 3, 4, 11]] = 0
    return {
        "zeros": torch.zeros(12, 18),
        "dead rows": dead,
        "dead depthwise channels": dead[:, :9].reshape(12, 1, 3, 3),
        "constant": torch.full((12, 18), -0.3),
        "one row": weight[:1],
        "one column": weight[:, :1],
        "one weight": weight[:1, :1],
        "one zero": torch.zeros(1, 1),
        "pointwise": weight.view(12, 18, 1, 1),
        "largest of float16": weight.sign() * 65504,
        "huge and tiny": torch.where(weight > 0.02, 60000.0, weight * 1e-5),
        "subnormal": weight * 1e-5,
        "smallest subnormal": weight.sign() * 2**-24,
        "below float16": weight * 1e-12,
        "below float32": weight.double() * 1e-60,
        "negative zero": -torch.zeros(12, 18),
        "one outlier": torch.zeros(12, 18).index_fill_(1, torch.tensor([7]), 9.0),
    }


@pytest.mark.parametrize("kind", ENCODINGS)
@pytest.mark.parametrize("content", awkward())
@pytest.mark.parametrize("method", METHODS)
def test_awkward_tensors_give_finite_values(kind, content, method):
    weight = awkward()[content]
    encoding = Encoding(kind=kind, tile=(4, 8), refit_scales=content != "zeros")
    for bits, spare in ((1, 0), (2, 40), (4, 600)) if method == "hierarchical" else ((3, 60),):
        packed = encode(weight, plan(weight.shape, bits, spare), encoding, Init(method=method))
        decoded = packed()
        assert decoded.shape == weight.shape and decoded.isfinite().all()
        assert math.isfinite(packed.relative_error)
        assert packed.codebooks.isfinite().all()
        if content in ("zeros", "constant", "negative zero", "one zero"):
            assert (decoded - weight).abs().max() <= 2**-11 * weight.abs().max()
        if method != "random":
            dead = weight.reshape(len(weight), -1).abs().sum(1) == 0
            loss = (decoded.double() - weight.double()).norm()
            assert loss <= weight.double().norm() * (1 + 1e-6)
            if kind == "per_row":
                assert decoded[dead].eq(0).all()


@pytest.mark.parametrize("kind", ["multi_scale", "multi_codebook"])
def test_zero_rows_with_a_group_of_their_own_stay_zero(kind):
    weight = gaussian(8, 32)
    weight[[2, 5]] = 0
    spare = 8 * 8 if kind == "multi_codebook" else 8 + 2 * 8
    packed = encode(
        weight, plan(weight.shape, 2, spare), Encoding(kind=kind), FAST, try_stored_order=False
    )
    assert packed()[[2, 5]].eq(0).all() and packed()[0].ne(0).any()
    if kind == "multi_scale":
        assert packed.scales[[2, 5]].eq(0).all() and packed.scales[0] > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_decodes_to_the_dtype_of_the_weight(dtype):
    weight = gaussian(8, 16).to(dtype)
    packed = encode(weight, plan(weight.shape, 4, 200), Encoding(), FAST)
    assert packed().dtype == dtype and packed.relative_error < 0.1


def test_relative_error_is_the_frobenius_ratio():
    weight = gaussian(16, 16)
    packed = encode(weight, plan(weight.shape, 2, 80), Encoding(), FAST)
    expected = np.linalg.norm((packed() - weight).numpy()) / np.linalg.norm(weight.numpy())
    assert packed.relative_error == pytest.approx(expected, rel=1e-5)


def test_relative_error_of_weights_that_float16_loses_is_one():
    packed = encode(gaussian(8, 16) * 1e-15, plan((8, 16), 2, 80), Encoding(), FAST)
    assert packed.relative_error == pytest.approx(1.0)


def test_equal_seeds_give_equal_codes():
    weight = gaussian(16, 48)
    for method in METHODS:
        one, other = (
            encode(weight, plan(weight.shape, 2, 120), Encoding(kind="auto"), Init(method=method))
            for _ in range(2)
        )
        for a, b in zip(one.buffers(), other.buffers(), strict=True):
            assert torch.equal(a, b)


def test_encoding_uses_no_global_random_numbers():
    torch.manual_seed(3)
    np.random.seed(3)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(3)
    np.random.seed(3)
    for method in METHODS:
        encode(gaussian(16, 48), plan((16, 48), 2, 120), Encoding(), Init(method=method))
    assert torch.equal(torch.rand(1), expected[0]) and np.random.rand() == expected[1]


@pytest.mark.parametrize("kind", ["multi_scale", "multi_codebook", "per_row", "tiles"])
def test_orders_are_permutations(kind):
    weight = gaussian(20, 7)
    order = neuron_order(weight, 5, kind, Init(), seed=0)
    assert order.sort().values.tolist() == list(range(20))


def test_group_count_is_what_is_built():
    allocation = plan((16, 64), 2, 100)
    weight = gaussian(16, 64)
    for kind in ("multi_scale", "multi_codebook", "per_row", "tiles", "trellis"):
        packed = encode(weight, allocation, Encoding(kind=kind), FAST, try_stored_order=False)
        scales = kind in ("multi_scale", "trellis")
        built = packed.scales.numel() if scales else len(packed.codebooks)
        assert group_count(kind, allocation, Encoding(kind=kind)) == built


@pytest.mark.parametrize("factor", [1.0, 1e-4, 1e5, 3e6])
def test_int8_error_is_at_most_half_a_step(factor):
    weight = gaussian(8, 40) * factor
    weight = weight.clamp(-64900, 64900)
    weight[3] = 0
    packed = encode_int8(weight)
    step = weight.abs().amax(1) / 127
    # The float16 scale moves the largest level by up to 127 * 2^-11 steps, which then is clipped.
    assert ((packed() - weight).abs() <= 0.57 * step[:, None] + 1e-9).all()
    assert packed()[3].eq(0).all()
    assert packed.bits == 8 and packed.scales.numel() == 8
    expected = (packed() - weight).norm() / weight.norm()
    assert packed.relative_error == pytest.approx(float(expected), rel=1e-3)
