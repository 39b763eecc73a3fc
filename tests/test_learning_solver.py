"""The discrete solver and the quadratic objective against brute force and plain least squares."""

import itertools
from dataclasses import replace

import pytest
import torch

from jlcm.learning.factors import Factors, pack_factors, unpack_factors
from jlcm.learning.objective import Deviation, Moments, inverse_factor, quadratic
from jlcm.learning.solver import (
    cluster_rows,
    coordinate_descent,
    feedback_rounding,
    improve,
    least_squares_codebooks,
    least_squares_rows,
    least_squares_scales,
    nearest_codes,
    start,
)
from jlcm.packed import PackedWeight


def problem_of(groups=1, rows=6, n=5, positions=60, seed=0, centred=False, weights=None):
    torch.manual_seed(seed)
    x = torch.randn(groups, n, positions) + 0.3
    x[:, 1:] += 0.7 * x[:, :-1]
    w = torch.randn(groups, rows, n)
    y = w @ x + 0.1 * torch.randn(groups, rows, positions)
    moments = Moments.zeros(groups, rows, n, torch.device("cpu"))
    moments.add(x[..., :25], y[..., :25])
    moments.add(x[..., 25:], y[..., 25:])
    return quadratic(moments, centred=centred, weights=weights), x, y, w


def factors_of(shape, k=4, books=1, scales=0, rows=False, seed=1):
    torch.manual_seed(seed)
    groups, n_o, n = shape
    count = groups * n_o * n
    position = torch.arange(count).view(shape)
    return Factors(
        codes=torch.randint(k, shape),
        codebooks=torch.randn(books, k).sort(1).values,
        book=position * books // count if books > 1 else None,
        scales=torch.rand(scales) + 0.5 if scales else None,
        scale=position * scales // count if scales > 1 else None,
        row_scale=torch.rand(groups, n_o) + 0.5 if rows else None,
    )


LAYOUTS = [
    {"k": 4},
    {"k": 4, "rows": True},
    {"k": 3, "books": 3},
    {"k": 4, "scales": 4},
    {"k": 2, "books": 12, "rows": True},
    {"k": 4, "scales": 1, "rows": True},
]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("centred", [False, True])
def test_quadratic_is_the_direct_squared_error(groups, centred):
    weights = torch.rand(groups, 6)
    problem, x, y, w = problem_of(groups, centred=centred, weights=weights)
    guess = w + 0.2 * torch.randn_like(w)
    error, target = guess @ x - y, y
    if centred:
        error, target = (t - t.mean(-1, keepdim=True) for t in (error, target))
    direct = (weights * error.square().mean(-1)).sum()
    direct = direct / (weights * target.square().mean(-1)).sum()
    torch.testing.assert_close(problem.loss(guess), direct, rtol=1e-4, atol=1e-6)
    leaf = guess.clone().requires_grad_()
    problem.loss(leaf).backward()
    torch.testing.assert_close(problem.gradient(guess), leaf.grad, rtol=1e-4, atol=1e-6)


def test_minimiser_is_ridge_regression_towards_the_original():
    problem, x, y, w = problem_of()
    damped = problem.damped(w, 0.05)
    ridge = 0.05 * float(problem.gram.diagonal(dim1=-2, dim2=-1).mean())
    count = x.shape[-1]
    a = torch.cat([x[0].T / count**0.5, ridge**0.5 * torch.eye(5)])
    b = torch.cat([y[0].T / count**0.5, ridge**0.5 * w[0].T])
    expected = torch.linalg.lstsq(a, b).solution.T
    torch.testing.assert_close(damped.minimiser()[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [1, 2])
def test_codebooks_and_scales_equal_lstsq(layout, groups):
    weights = torch.rand(groups, 6) + 0.5
    problem, x, y, _ = problem_of(groups, weights=weights)
    factors = factors_of((groups, 6, 5), **layout)

    def outputs(weight):
        return (weights.sqrt()[..., None] * (weight @ x)).reshape(-1).double()

    def compare(size, build, fitted):
        columns = [outputs(build(e)) for e in torch.eye(size)]
        goal = (weights.sqrt()[..., None] * y).reshape(-1).double()
        best = torch.linalg.lstsq(torch.stack(columns, 1), goal[:, None], driver="gelsd").solution
        residual = (torch.stack(columns, 1) @ best - goal[:, None]).square().sum()
        found = (outputs(fitted.weight()) - goal).square().sum()
        torch.testing.assert_close(found, residual, rtol=2e-4, atol=1e-8)

    shape = factors.codebooks.shape
    compare(
        shape.numel(),
        lambda e: replace(factors, codebooks=e.view(shape)).weight(),
        least_squares_codebooks(problem, factors),
    )
    if factors.scales is not None:
        compare(
            len(factors.scales),
            lambda e: replace(factors, scales=e).weight(),
            least_squares_scales(problem, factors),
        )
    if factors.row_scale is not None:
        compare(
            groups * 6,
            lambda e: replace(factors, row_scale=e.view(groups, 6)).weight(),
            least_squares_rows(problem, factors),
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_coordinate_descent_never_raises_the_loss_and_ends_where_no_single_change_helps(layout):
    problem, _, _, w = problem_of(2, n=70)
    factors = factors_of((2, 6, 70), **layout)
    loss = float(problem.loss(factors.weight()))
    for _ in range(3):
        factors = coordinate_descent(problem, factors, 1)
        assert float(problem.loss(factors.weight())) <= loss * (1 + 1e-5)
        loss = float(problem.loss(factors.weight()))
    factors = coordinate_descent(problem, factors, 100)
    loss = problem.loss(factors.weight())
    for place in itertools.product(range(2), range(6), (0, 33, 69)):
        for code in range(factors.codebooks.shape[1]):
            codes = factors.codes.clone()
            codes[place] = code
            other = problem.loss(replace(factors, codes=codes).weight())
            assert float(other) >= float(loss) * (1 - 1e-4)


def test_solver_comes_close_to_the_best_codes():
    ratios = []
    for seed in range(12):
        problem, _, _, w = problem_of(rows=1, n=5, seed=seed)
        factors = replace(factors_of((1, 1, 5), k=3), codebooks=torch.tensor([[-1.0, 0.1, 1.2]]))
        every = [
            float(problem.loss(replace(factors, codes=torch.tensor([[c]])).weight()))
            for c in itertools.product(range(3), repeat=5)
        ]
        rounded = feedback_rounding(problem, problem.minimiser(), factors)
        found = float(problem.loss(coordinate_descent(problem, rounded, 20).weight()))
        plain = replace(factors, codes=nearest_codes(factors, w))
        assert found >= min(every) * (1 - 1e-4)
        ratios.append((found / min(every), float(problem.loss(plain.weight())) / min(every)))
    found, plain = torch.tensor(ratios).median(0).values
    assert found <= 1.1
    assert found <= plain


def test_feedback_rounding_beats_nearest_rounding():
    problem, _, _, w = problem_of(rows=16, n=150, positions=600)
    problem = problem.damped(w, 0.01)
    target = problem.minimiser()
    factors = cluster_rows(problem, target, factors_of((1, 16, 150), k=4, rows=True))
    rounded = feedback_rounding(problem, target, factors)
    assert problem.loss(rounded.weight()) < 0.8 * problem.loss(factors.weight())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("row_scale", [False, True])
def test_solve_improves_every_layout(layout, row_scale):
    problem, _, _, w = problem_of(3, n=12, positions=200)
    problem = problem.damped(w, 0.01)
    factors = replace(factors_of((3, 6, 12), **layout), row_scale=None)
    nearest = replace(factors, codes=nearest_codes(factors, w / factors.multiplier()))
    started = start(problem, problem.minimiser(), nearest, row_scale=row_scale)
    solved, curve = improve(problem, started, rounds=2, sweeps=2)
    assert min(curve) <= problem.loss(started.weight())
    assert problem.loss(solved.weight()) < problem.loss(nearest.weight())
    assert (solved.codebooks.diff(dim=1) >= 0).all()
    assert torch.equal(solved.codebooks.half().float(), solved.codebooks)


@pytest.mark.parametrize("part", [0.0, 0.3, 1.0])
def test_corrected_target_is_between_the_outputs_of_both_networks(part):
    groups, rows, n = 2, 4, 6
    torch.manual_seed(0)
    x, w = torch.randn(groups, n, 80), torch.randn(groups, rows, n)
    y = w @ (x + 0.3 * torch.randn_like(x))
    given = Moments.zeros(groups, rows, n, torch.device("cpu"))
    expected = Moments.zeros(groups, rows, n, torch.device("cpu"))
    given.add(x, y)
    expected.add(x, part * y + (1 - part) * (w @ x))
    found = quadratic(given, centred=True).corrected(w, part)
    expected = quadratic(expected, centred=True)
    for name in ("gram", "cross", "energy"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), atol=1e-4, rtol=1e-4
        )
    # The minimiser moves in proportion, whatever the ridge.
    full = quadratic(given, centred=True).damped(w, 0.2).minimiser()
    goal = found.damped(w, 0.2).minimiser()
    torch.testing.assert_close(goal, torch.lerp(w, full, part), atol=1e-4, rtol=1e-4)


def test_line_minimum_is_the_least_loss_between_two_weights():
    problem, _, _, w = problem_of(3, n=8)
    best = problem.minimiser()
    assert problem.line_minimum(w, best) == pytest.approx(1.0, abs=1e-3)
    assert problem.line_minimum(w, w + 2 * (best - w)) == pytest.approx(0.5, abs=1e-3)
    assert problem.line_minimum(best, w) == pytest.approx(0.0, abs=1e-3)
    assert problem.line_minimum(w, w) == 1.0
    other = w + torch.randn_like(w)
    part = problem.line_minimum(w, other)
    steps = torch.linspace(0, 1, 101)
    losses = torch.stack([problem.loss(torch.lerp(w, other, p)) for p in steps])
    assert float(steps[losses.argmin()]) == pytest.approx(part, abs=0.011)


def test_deviation_agrees_with_the_quadratic_form():
    problem, _, _, w = problem_of(3, n=8)
    near = Deviation(problem, w)
    for weight in (w, w + 0.1 * torch.randn_like(w)):
        loss, slope = near.loss_and_gradient(weight)
        assert loss == pytest.approx(float(problem.loss(weight)), rel=0.01, abs=1e-5)
        expected = problem.gradient(weight)
        assert float((slope - expected).norm()) <= 0.01 * float(expected.norm())


def test_inverse_factor_is_the_upper_root_of_the_inverse():
    x = torch.randn(2, 20, 60, dtype=torch.float64)
    gram = x @ x.mT / 60
    upper = inverse_factor(gram.float()).double()
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.mT @ upper, gram.inverse(), rtol=1e-3, atol=1e-3)


def test_dead_inputs_and_zero_scales_give_no_nan():
    problem, _, _, w = problem_of(2, n=6)
    dead = replace(problem, gram=problem.gram.clone(), cross=problem.cross.clone())
    dead.gram[1], dead.cross[1] = 0, 0
    damped = dead.damped(w, 0.01)
    factors = replace(factors_of((2, 6, 6), scales=4), scales=torch.tensor([1.0, 0.0, 0.5, 0.0]))
    for row_scale in (False, True):
        started = start(damped, damped.minimiser(), factors, row_scale=row_scale)
        solved, _ = improve(damped, started, rounds=2, sweeps=1)
        assert solved.weight().isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {"books": 1},
        {"books": 3},
        {"books": 1, "scales": 5},
        {"books": 4, "order": True},
        {"books": 9, "tile": (2, 3)},
    ],
)
@pytest.mark.parametrize("groups", [1, 2])
def test_factors_decode_like_the_packed_weight_and_survive_packing(options, groups):
    torch.manual_seed(0)
    order = torch.randperm(6) if options.get("order") else None
    scales = torch.rand(options["scales"]) if "scales" in options else None
    packed = (
        PackedWeight.encode(
            torch.randint(4, (48,)),
            torch.randn(12 if "tile" in options else options["books"], 4).half(),
            shape=(6, 8),
            bits=2,
            scales=scales,
            order=order,
            tile=options.get("tile"),
        )
        if "tile" not in options
        else PackedWeight.encode(
            torch.randint(4, (48,)), torch.randn(9, 4), shape=(6, 8), bits=2, tile=(2, 3)
        )
    )
    factors = unpack_factors(packed, groups)
    assert torch.equal(factors.weight().view(6, 8), packed())
    before = packed()
    for name, value in pack_factors(packed, factors).items():
        assert value.shape == getattr(packed, name).shape
        assert value.dtype == getattr(packed, name).dtype
        getattr(packed, name).copy_(value)
    assert torch.equal(packed(), before)
    assert (packed.codebooks.float().diff(dim=1) >= 0).all()
