"""Bits shared out by estimated distortions: bytes kept, and the best of all plans."""

import itertools
import math

import pytest
import torch

from jlcm.budget import Allocation, allocate, least_bytes
from jlcm.config import Encoding, Invalid


def quartering(shapes, seed):
    """Costs of tensors that differ in sensitivity, a quarter for each further bit."""
    draws = torch.randn(len(shapes), generator=torch.Generator().manual_seed(seed))
    spread = draws.mul(2).exp().tolist()
    return {
        name: [math.prod(shape) * c * 4.0**-bits for bits in range(1, 9)]
        for (name, shape), c in zip(shapes.items(), spread, strict=True)
    }


def total(costs, plans):
    return sum(costs[name][plan.bits - 1] for name, plan in plans.items())


def goal(shapes, alpha):
    return math.floor(2 * sum(map(math.prod, shapes.values())) / alpha)


@pytest.mark.parametrize("kind", ["multi_scale", "multi_codebook", "auto", "per_row"])
@pytest.mark.parametrize("alpha", [2.1, 4.1, 16 / 3, 7.5])
def test_bits_by_distortion_are_better_than_equal_bits_at_the_same_bytes(kind, alpha):
    widths = [(32, 147), (64, 288), (64, 576), (128, 576), (128, 1152), (256, 1152), (100, 256)]
    shapes = {str(i): shape for i, shape in enumerate([*widths, *widths])}
    encoding = Encoding(kind=kind)
    for seed in range(10):
        costs = quartering(shapes, seed)
        plans, equal = allocate(shapes, alpha, encoding, costs), allocate(shapes, alpha, encoding)
        assert list(plans) == list(shapes)
        assert all(1 <= plan.bits <= 8 for plan in plans.values())
        assert sum(plan.nbytes for plan in plans.values()) <= goal(shapes, alpha)
        for plan in plans.values():
            assert least_bytes(kind, plan, encoding.tile) <= plan.nbytes
        assert total(costs, plans) < total(costs, equal)


def test_bits_by_distortion_are_the_best_of_all():
    generator = torch.Generator().manual_seed(0)
    encoding, ratios = Encoding(), []
    for seed in range(60):
        sides = torch.randint(4, 41, (4, 2), generator=generator).tolist()
        shapes = {str(i): tuple(pair) for i, pair in enumerate(sides)}
        costs, alpha = quartering(shapes, seed), (3.0, 4.1, 5.33, 7.5)[seed % 4]
        sizes = [
            [
                least_bytes("multi_scale", Allocation(rows=r, columns=c, bits=b), encoding.tile)
                for b in range(1, 9)
            ]
            for r, c in shapes.values()
        ]
        best = math.inf
        for bits in itertools.product(range(8), repeat=4):
            if sum(size[b] for size, b in zip(sizes, bits, strict=True)) <= goal(shapes, alpha):
                harm = sum(cost[b] for cost, b in zip(costs.values(), bits, strict=True))
                best = min(best, harm)
        plans = allocate(shapes, alpha, encoding, costs)
        assert sum(plan.nbytes for plan in plans.values()) <= goal(shapes, alpha)
        ratios.append(total(costs, plans) / best)
    assert ratios == pytest.approx([1.0] * 60, rel=1e-9)


def test_large_budgets_are_counted_in_steps_that_hardly_matter(monkeypatch):
    shapes = {str(i): (64 + 8 * i, 128) for i in range(12)}
    for seed, alpha in itertools.product(range(5), (4.1, 5.33, 7.5)):
        costs = quartering(shapes, seed)
        exact = allocate(shapes, alpha, Encoding(), costs)
        with monkeypatch.context() as patch:
            patch.setattr("jlcm.budget.STEPS", 2**11)
            coarse = allocate(shapes, alpha, Encoding(), costs)
        assert sum(plan.nbytes for plan in coarse.values()) <= goal(shapes, alpha)
        assert 1 - 1e-9 < total(costs, coarse) / total(costs, exact) < 1.03


def test_sensitive_tensors_get_more_bits_and_harmless_ones_one():
    shapes = {name: (64, 256) for name in ("low", "same", "high")}
    falling = [4.0**-bits for bits in range(1, 9)]
    costs = {
        "low": [0.0] * 8,
        "same": [1000 * d for d in falling],
        "high": [64_000 * d for d in falling],
    }
    plans = allocate(shapes, 4.1, Encoding(), costs)
    bits = {name: plan.bits for name, plan in plans.items()}
    assert bits["low"] == 1 and bits["high"] - bits["same"] in (2, 3, 4)
    # Plateaus: the first bit of a step need not pay.
    steps = {"a": [8.0, 8.0, 8.0, 0.0], "b": [1.0, 1.0, 1.0, 1.0]}
    plans = allocate({"a": (64, 64), "b": (64, 64)}, 6.0, Encoding(), steps)
    assert {name: plan.bits for name, plan in plans.items()} == {"a": 4, "b": 1}


def test_goals_out_of_reach_are_refused_with_distortions_too():
    shapes = {"a": (16, 16), "b": (16, 9)}
    with pytest.raises(Invalid, match="cannot be reached"):
        allocate(shapes, 15.9, Encoding(), quartering(shapes, 0))
