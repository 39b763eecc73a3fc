"""Eq. 3 against its closed formulas, and the pooled budget against what encoding really takes."""

import math
import re
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from jlcm.budget import (
    Allocation,
    allocate,
    bytes_of,
    code_bits,
    codebook_bytes,
    groups_for,
    least_bytes,
)
from jlcm.config import ENCODINGS, Encoding, Init, Invalid
from jlcm.encode import encode
from jlcm.packing import packed_bytes

BIG = (512, 4608)
ALPHAS = (1.05, 1.5, 1.9, 2.1, 2.5, 3.0, 3.5, 4.1, 5.0, 5.33, 6.0, 6.4, 7.0, 7.5, 7.9, 9.0, 15.0)


def reached(message: str) -> float:
    return float(re.search(r"reach ([\d.]+)$", message).group(1))


@pytest.mark.parametrize("bits", range(1, 17))
def test_codebook_size_at_integer_quotients(bits):
    assert code_bits(16 / bits) == min(bits, 8)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_codebook_size_is_two_to_the_floor(alpha):
    assert code_bits(alpha) == min(math.floor(Fraction(16) / Fraction(alpha)), 8)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("kind", ["multi_scale", "multi_codebook"])
def test_group_counts_of_one_big_tensor_are_equation_3(alpha, kind):
    weights, bits = math.prod(BIG), code_bits(alpha)
    size = 2**bits
    exact = Fraction(str(alpha))
    allocation = allocate({"w": BIG}, alpha, Encoding(kind=kind))["w"]
    books, scales = groups_for(kind, allocation.spare, allocation, (8, 64))
    if kind == "multi_codebook":
        # k = (16 - alpha log K) N / (16 alpha K), as printed
        assert (books, scales) == (
            math.floor((16 - exact * bits) * weights / (16 * exact * size)),
            0,
        )
    else:
        # N / alpha - N log(K) / 16, as printed, less the codebook that it leaves out
        printed = (16 - exact * bits) * weights / (16 * exact)
        assert (books, scales) == (1, math.floor(printed - size))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_per_layer_keeps_the_printed_rule(alpha):
    shapes = {"a": BIG, "b": (64, 576), "c": (256, 1152)}
    bits, exact = code_bits(alpha), Fraction(str(alpha))
    for kind in ("multi_scale", "multi_codebook"):
        plans = allocate(shapes, alpha, Encoding(kind=kind, budget="per_layer"))
        for name, plan in plans.items():
            assert plan.bits == bits
            books, scales = groups_for(kind, plan.spare, plan, (8, 64))
            printed = (16 - exact * bits) * math.prod(shapes[name]) / (16 * exact)
            if kind == "multi_scale":
                assert (books, scales) == (1, max(math.floor(printed), 1))
            else:
                assert (books, scales) == (max(math.floor(printed / 2**bits), 1), 0)


def test_small_layers_at_the_alpha_that_eq_3_cannot_give_them():
    # 64 x 64 x 3 x 3 at 16/3: log K alone takes the budget; the exact count is negative.
    encoding = Encoding(kind="multi_scale")
    plans = allocate({"a": (64, 576), "b": (64, 576), "c": (512, 4608)}, 16 / 3, encoding)
    total = sum(p.count for p in plans.values())
    assert sum(p.nbytes for p in plans.values()) <= math.floor(2 * total / (16 / 3))
    assert {p.bits for p in plans.values()} == {2, 3}


@given(st.sampled_from(("multi_scale", "multi_codebook", "per_row", "tiles", "trellis")), st.data())
@settings(deadline=None)
def test_group_counts_cost_no_more_than_the_spare_bytes(kind, data):
    rows, columns = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    bits, spare = data.draw(st.integers(1, 8)), data.draw(st.integers(-10, 4000))
    plan = Allocation(rows=rows, columns=columns, bits=bits)
    counts = groups_for(kind, spare, plan, (8, 8))
    least = least_bytes(kind, plan, (8, 8)) - packed_bytes(plan.count, bits)
    assert bytes_of(kind, *counts, plan) <= max(spare, least)
    assert counts[0] >= 1 and max(counts) <= max(plan.count, 1)


shapes_strategy = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 40), st.integers(1, 60)),
        st.tuples(st.integers(1, 64), st.sampled_from([1, 9, 25])),  # depthwise
        st.tuples(st.sampled_from([1, 100]), st.sampled_from([1, 100])),
    ),
    min_size=1,
    max_size=5,
)
encodings = st.builds(
    Encoding,
    kind=st.sampled_from(ENCODINGS),
    tile=st.tuples(st.integers(1, 12), st.integers(1, 70)),
    refit_scales=st.booleans(),
)


@settings(deadline=None, max_examples=40)
@given(
    shapes_strategy,
    st.floats(1, 16, exclude_min=True) | st.sampled_from([16 / b for b in range(1, 16)]),
    encodings,
    st.booleans(),
)
@example([(64, 256)], 7.09, Encoding(kind="tiles", tile=(8, 32)), True)  # no room for an order
@example([(2, 33)], 8.8, Encoding(), False)  # an exact quotient that floating point misses
def test_packed_bytes_never_exceed_the_goal(shapes, alpha, encoding, store):
    named = {f"{i}": shape for i, shape in enumerate(shapes)}
    try:
        plans = allocate(named, alpha, encoding)
    except Invalid as error:
        best = reached(str(error))
        assert f"alpha={alpha:g}" in str(error) and encoding.kind in str(error)
        assert best < alpha
        if best > 1:  # the named goal is indeed in reach
            allocate(named, best, encoding)
        return
    total = sum(rows * columns for rows, columns in shapes)
    size = 0
    generator = torch.Generator().manual_seed(0)
    for name, shape in named.items():
        assert 1 <= plans[name].bits <= code_bits(alpha)
        weight = torch.randn(shape, generator=generator)
        packed = encode(
            weight, plans[name], encoding, Init(method="random"), always_store_order=store
        )
        used = sum(b.numel() * b.element_size() for b in packed.buffers())
        assert used <= plans[name].nbytes
        size += used
    assert 2 * total / size >= alpha


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.integers(64, 512), st.integers(500, 5000)), min_size=1, max_size=6).map(
        lambda big: [(32, 27), (64, 9), *big, (10, 64)]
    ),
    st.floats(1.01, 15),
    st.sampled_from(["multi_scale", "multi_codebook", "auto"]),
)
def test_big_models_use_the_goal_up(shapes, alpha, kind):
    named = {f"{i}": shape for i, shape in enumerate(shapes)}
    total = sum(rows * columns for rows, columns in shapes)
    assume(total > 200_000)
    plans = allocate(named, alpha, Encoding(kind=kind))
    for one in ("multi_scale", "multi_codebook") if kind == "auto" else (kind,):
        used = sum(
            packed_bytes(p.count, p.bits) + bytes_of(one, *groups_for(one, p.spare, p, (8, 64)), p)
            for p in plans.values()
        )
        assert alpha <= 2 * total / used <= 1.02 * alpha


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 8), st.sampled_from([1, 9, 64, 512, 4608]))
def test_equal_tensors_get_equal_bytes(number, columns):
    named = {f"{i}": (64, columns) for i in range(number)}
    try:
        plans = allocate(named, 3.5, Encoding())
    except Invalid:
        return
    sizes = {(p.bits, p.nbytes) for p in plans.values()}
    assert len(sizes) == len({bits for bits, _ in sizes})


def test_first_and_last_keep_their_bits_longest():
    named = {f"{i}": (64, 576) for i in range(6)}
    plans = allocate(named, 8.0, Encoding())
    bits = [p.bits for p in plans.values()]
    assert bits[0] == bits[-1] == 2 and bits.count(1) == 1


@pytest.mark.parametrize("alpha", [15.9, 16.0])
def test_goals_out_of_reach_name_the_largest_in_reach(alpha):
    with pytest.raises(Invalid) as caught:
        allocate({"a": (16, 16), "b": (16, 9)}, alpha, Encoding(kind="multi_codebook"))
    best = reached(str(caught.value))
    assert 1 < best < alpha
    plans = allocate({"a": (16, 16), "b": (16, 9)}, best, Encoding(kind="multi_codebook"))
    assert all(p.bits == 1 for p in plans.values())
    with pytest.raises(Invalid):
        allocate({"a": (16, 16), "b": (16, 9)}, best + 0.01, Encoding(kind="multi_codebook"))


def test_codebook_bytes():
    assert [codebook_bytes(b) for b in (1, 2, 8)] == [4, 8, 512]
