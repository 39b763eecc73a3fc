"""Scalar clustering against independent oracles: kmeans1d, fastcluster, scipy, brute force."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jlcm.clustering import scalar
from jlcm.clustering.kmeans import _optimal_boundaries
from jlcm.clustering.points import SORT_LIMIT, Points, codebooks_from_starts, distinct
from jlcm.clustering.scalar import METHODS, assign, cluster
from jlcm.clustering.ward import ward_starts

kmeans1d = pytest.importorskip("kmeans1d")

INTERVAL_METHODS = ("kmeans", "bisecting", "hierarchical")


def draw(kind: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """fp16-representable float32 samples."""
    x = {
        "gaussian": lambda: rng.normal(size=n) * 0.02,
        "heavy tail": lambda: rng.standard_t(2, size=n).clip(-6e4, 6e4),
        "duplicates": lambda: rng.integers(-12, 12, size=n) / 8,
        "bimodal": lambda: rng.normal(size=n) + 40 * rng.integers(0, 2, size=n),
    }[kind]()
    return x.astype(np.float16).astype(np.float32)


KINDS = ("gaussian", "heavy tail", "duplicates", "bimodal")


def error(values, codebooks, codes, sizes=None, importance=None) -> float:
    values = torch.as_tensor(values).double()
    rows = torch.repeat_interleave(
        torch.arange(len(codebooks)), torch.tensor([len(values)]) if sizes is None else sizes
    )
    squared = (values - codebooks[rows, codes.long()].double()) ** 2
    return float((squared if importance is None else squared * importance.double()).sum())


def unrounded_error(points: Points, starts: np.ndarray, k: int) -> float:
    """Weighted squared error of interval clusters with exact means (before fp16 rounding)."""
    codebooks = codebooks_from_starts(points, starts, k)
    total = 0.0
    for g, (a, b) in enumerate(zip(points.offsets[:-1], points.offsets[1:], strict=True)):
        label = np.cumsum(starts[a:b]) - 1
        total += float(
            (points.weights[a:b] * (points.values[a:b] - codebooks[g, label]) ** 2).sum()
        )
    return total


def as_points(x: np.ndarray, weights: np.ndarray | None = None) -> Points:
    return distinct(
        torch.from_numpy(x),
        np.array([len(x)]),
        None if weights is None else torch.from_numpy(weights),
    )


def kmeans1d_error(x: np.ndarray, k: int) -> float:
    x = x.astype(np.float64)
    reference = kmeans1d.cluster(x, min(k, len(np.unique(x))))
    return float(((x - np.array(reference.centroids)[reference.clusters]) ** 2).sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 8, 15, 16])
@pytest.mark.parametrize("n", [1, 7, 33, 480])
def test_kmeans_is_optimal(kind, k, n):
    x = draw(kind, n, np.random.default_rng(n + k))
    points = as_points(x)
    ours = unrounded_error(points, scalar.kmeans_starts(points, k), k)
    assert ours == pytest.approx(kmeans1d_error(x, k), rel=1e-7, abs=1e-9 * float((x**2).sum()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [2, 7, 16, 64])
def test_kmeans_is_optimal_on_a_large_group(kind, k):
    x = draw(kind, SORT_LIMIT + 1000, np.random.default_rng(k))
    points = distinct(torch.from_numpy(x), np.array([len(x)]))
    assert len(points.values) == len(np.unique(x))
    ours = unrounded_error(points, scalar.kmeans_starts(points, k), k)
    assert ours == pytest.approx(kmeans1d_error(x, k), rel=1e-7, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.integers(-30, 30), min_size=1, max_size=25),
    data=st.data(),
    k=st.integers(1, 6),
)
def test_weighted_kmeans_equals_repeated_points(values, data, k):
    counts = data.draw(st.lists(st.integers(1, 5), min_size=len(values), max_size=len(values)))
    x, w = np.array(values, dtype=np.float32), np.array(counts, dtype=np.float64)
    points = as_points(x, w)
    ours = unrounded_error(points, scalar.kmeans_starts(points, k), k)
    assert ours == pytest.approx(kmeans1d_error(np.repeat(x, counts), k), rel=1e-9, abs=1e-9)


def test_weighted_kmeans_against_brute_force():
    rng = np.random.default_rng(3)
    for _ in range(40):
        n, k = 9, int(rng.integers(2, 6))
        x = np.sort(rng.normal(size=n)).astype(np.float32)
        w = rng.exponential(size=n) ** 4
        best = np.inf
        for cuts in combinations(range(1, n), k - 1):
            parts = np.split(np.arange(n), cuts)
            total = sum(
                (w[p] * (x[p] - np.average(x[p].astype(float), weights=w[p])) ** 2).sum()
                for p in parts
            )
            best = min(best, total)
        points = as_points(x, w)
        ours = unrounded_error(points, scalar.kmeans_starts(points, k), k)
        assert ours == pytest.approx(best, rel=1e-9)


def test_pruning_bound_does_not_change_the_optimum(monkeypatch):
    """The dynamic programme with and without its error bound finds equally good boundaries."""
    rng = np.random.default_rng(4)
    x = torch.from_numpy(np.concatenate([draw(kind, 300, rng) for kind in KINDS]))
    points = distinct(x, np.full(4, 300))
    points, _ = points.select(points.counts > 16)

    def total() -> float:
        starts = np.zeros(len(points.values), dtype=bool)
        starts[points.offsets[:-1]] = True
        starts[(_optimal_boundaries(points, 16) + points.offsets[:-1, None]).ravel()] = True
        return unrounded_error(points, starts, 16)

    pruned = total()
    monkeypatch.setattr(
        "jlcm.clustering.kmeans._error_bound", lambda x, w, counts, k: np.full(len(counts), 1e30)
    )
    assert pruned == pytest.approx(total(), rel=1e-12)


@pytest.mark.parametrize("n", [SORT_LIMIT, SORT_LIMIT + 1, 150_000])
@pytest.mark.parametrize("k", [4, 16])
def test_float32_values_are_within_a_thousandth_of_the_optimum(n, k):
    """Values that are not fp16-representable: exact in small groups, fp16 cells in large ones."""
    values = torch.randn(n, generator=torch.Generator().manual_seed(k)) / 3.7
    ours = error(values, *cluster(values, k=k, method="kmeans"))
    best = kmeans1d_error(values.numpy(), k)
    assert best * (1 - 1e-9) <= ours <= best * 1.001


@pytest.mark.parametrize("kind", ["gaussian", "heavy tail", "bimodal"])
@pytest.mark.parametrize("n", [5, 40, 400, 3000])
@pytest.mark.parametrize("k", [2, 4, 16])
def test_ward_equals_fastcluster_and_scipy(kind, n, k):
    fastcluster = pytest.importorskip("fastcluster")
    from scipy.cluster.hierarchy import fcluster, linkage

    rng = np.random.default_rng(n * k)
    x = {
        "gaussian": rng.normal(size=n),
        "heavy tail": rng.standard_t(2, size=n).clip(-6e4, 6e4),
        "bimodal": rng.normal(size=n) + 40 * rng.integers(0, 2, size=n),
    }[kind]
    x = np.unique(x.astype(np.float32))
    starts = ward_starts(as_points(x), k)
    column = x.astype(np.float64)[:, None]
    trees = [fastcluster.linkage_vector(column, "ward")]
    if n <= 400:
        trees.append(linkage(column, "ward"))
    for tree in trees:
        labels = fcluster(tree, k, "maxclust")
        assert np.array_equal(np.flatnonzero(np.diff(labels)) + 1, np.flatnonzero(starts)[1:])


@pytest.mark.parametrize("shape", ["ramp", "peak", "geometric", "equal"])
def test_ward_heap_and_rounds_agree(shape, monkeypatch):
    """Monotone costs leave few merges for each round; a heap must give the same tree."""
    n = 4000
    values = {"geometric": 1.003 ** np.arange(n)}.get(shape, np.arange(n) / 100.0)
    weights = {
        "ramp": np.exp(np.linspace(0, 12, n)),
        "peak": np.exp(-(np.linspace(-3, 3.1, n) ** 2)),
    }.get(shape, np.ones(n))
    points = Points(values=values, weights=weights, offsets=np.array([0, n]))
    results = []
    for slow, minimum in ((0.01, 1000), (0.0, 0), (2.0, 0)):
        monkeypatch.setattr("jlcm.clustering.ward._SLOW_ROUND", slow)
        monkeypatch.setattr("jlcm.clustering.ward._HEAP_MINIMUM", minimum)
        starts = ward_starts(points, 16)
        results.append((unrounded_error(points, starts, 16), starts))
    if shape == "equal":  # every order of equal merges is a valid one
        return
    assert all(np.array_equal(results[0][1], starts) for _, starts in results)


@pytest.mark.parametrize("method", METHODS)
def test_distortion_falls_with_k(method):
    values = torch.from_numpy(draw("gaussian", 20_000, np.random.default_rng(0)))
    errors = [error(values, *cluster(values, k=k, method=method)) for k in (1, 2, 4, 8, 16, 32)]
    if method == "random":  # cluster means of random labels hardly differ: no gain worth naming
        assert errors[-1] > 0.99 * errors[0]
    else:
        assert all(b < a for a, b in zip(errors, errors[1:], strict=False))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [2, 5, 16])
@pytest.mark.parametrize("weighted", [False, True])
def test_kmeans_has_the_smallest_error(kind, k, weighted):
    rng = np.random.default_rng(k)
    values = torch.from_numpy(draw(kind, 3000, rng))
    importance = torch.from_numpy(rng.exponential(size=3000)) if weighted else None
    errors = {
        m: error(
            values, *cluster(values, k=k, method=m, importance=importance), importance=importance
        )
        for m in METHODS
    }
    slack = 1e-5 * errors["kmeans"] + 1e-12  # codebooks are rounded to fp16
    assert all(errors["kmeans"] <= e + slack for e in errors.values())


@pytest.mark.parametrize("method", [m for m in METHODS if m != "random"])
@pytest.mark.parametrize("weighted", [False, True])
def test_batched_equals_looped(method, weighted):
    rng = np.random.default_rng(1)
    sizes = torch.tensor([1, 2, 480, 17, 300, 16, 481, 90_000, 5, 64])
    parts = [draw(KINDS[i % 4], n, rng) for i, n in enumerate(sizes.tolist())]
    values = torch.from_numpy(np.concatenate(parts))
    importance = torch.from_numpy(rng.exponential(size=len(values))) if weighted else None
    codebooks, codes = cluster(
        values, k=8, method=method, sizes=sizes, importance=importance, seed=3
    )
    start = 0
    for g, size in enumerate(sizes.tolist()):
        part = slice(start, start + size)
        one, own = cluster(
            values[part],
            k=8,
            method=method,
            importance=None if importance is None else importance[part],
            seed=3,
        )
        if method == "spectral":  # eigenvectors round differently: compare how good the results are
            ours = error(values[part], codebooks[g : g + 1], codes[part])
            assert ours == pytest.approx(error(values[part], one, own), rel=0.02, abs=1e-9)
        else:
            assert torch.equal(codes[part], own)
            assert torch.equal(codebooks[g], one[0])
        start += size


@pytest.mark.parametrize("method", [m for m in METHODS if m != "random"])
def test_integer_importance_equals_repetition(method):
    rng = np.random.default_rng(2)
    values = torch.from_numpy(draw("gaussian", 500, rng))
    counts = torch.from_numpy(rng.integers(0, 4, size=500))
    weighted, _ = cluster(values, k=8, method=method, importance=counts.double())
    repeated, _ = cluster(values.repeat_interleave(counts), k=8, method=method)
    assert torch.allclose(weighted, repeated, atol=1e-3 * 0.02)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_output_contract(method, dtype):
    values = torch.randn(700, generator=torch.Generator().manual_seed(0)).to(dtype)
    sizes = torch.tensor([300, 399, 1])
    codebooks, codes = cluster(values, k=16, method=method, sizes=sizes)
    assert codebooks.shape == (3, 16) and codebooks.dtype == torch.float32
    assert codes.shape == (700,) and codes.dtype == torch.uint8 and codes.max() < 16
    assert torch.equal(codebooks, codebooks.half().float())
    assert (codebooks.diff(dim=1) >= 0).all()
    assert (codebooks[2] == values[-1].half().float()).all()
    again = cluster(values, k=16, method=method, sizes=sizes)
    assert torch.equal(codebooks, again[0]) and torch.equal(codes, again[1])
    if method != "random":
        assert torch.equal(codes, assign(values, codebooks, sizes=sizes))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [1, 2, 16, 256])
def test_degenerate_groups(method, k):
    groups = [
        torch.zeros(9),
        torch.full((5,), 0.5),
        torch.tensor([1.0, 1.0, -2.0]),
        torch.tensor([-0.0, 0.0, 0.0]),
        torch.tensor([6e4, -6e4, 1e-7, -1e-7, 3.0]),
        torch.tensor([1.0, 2.0, 4.0, 8.0]),
    ]
    sizes = torch.tensor([len(g) for g in groups])
    importance = torch.ones(int(sizes.sum()), dtype=torch.float64)
    importance[-4:] = 0
    codebooks, codes = cluster(
        torch.cat(groups), k=k, method=method, sizes=sizes, importance=importance
    )
    assert codebooks.isfinite().all() and (codebooks.diff(dim=1) >= 0).all()
    assert (codebooks[0] == 0).all() and (codebooks[3] == 0).all() and (codebooks[1] == 0.5).all()
    if method != "random":
        if k >= 4:  # all-zero importance means equal importance
            assert codebooks[5, :4].tolist() == [1, 2, 4, 8] and (codebooks[5, 3:] == 8).all()
            assert codebooks[2, :2].tolist() == [-2, 1] and (codebooks[2, 1:] == 1).all()
            assert codes[-4:].tolist() == [0, 1, 2, 3]
        if k == 1:
            assert codebooks[5, 0] == 3.75


@pytest.mark.parametrize("method", ["kmeans", "bisecting", "hierarchical", "spectral"])
def test_importance_spanning_many_orders_of_magnitude(method):
    rng = np.random.default_rng(5)
    values = torch.from_numpy(draw("gaussian", 2000, rng))
    importance = torch.from_numpy(10.0 ** rng.uniform(-40, 0, size=2000))
    codebooks, codes = cluster(values, k=16, method=method, importance=importance)
    assert codebooks.isfinite().all()
    one = error(values, *cluster(values, k=1, importance=importance), importance=importance)
    assert error(values, codebooks, codes, importance=importance) < 0.1 * one


def test_importance_of_a_group_is_scale_free():
    rng = np.random.default_rng(6)
    values = torch.from_numpy(draw("gaussian", 900, rng))
    importance = torch.from_numpy(rng.exponential(size=900))
    scale = torch.tensor([1e-20, 1.0, 1e20], dtype=torch.float64).repeat_interleave(300)
    sizes = torch.tensor([300, 300, 300])
    for method in INTERVAL_METHODS:
        plain = cluster(values, k=8, method=method, sizes=sizes, importance=importance)
        scaled = cluster(values, k=8, method=method, sizes=sizes, importance=importance * scale)
        assert torch.equal(plain[1], scaled[1]), method


def test_random_is_uniform_with_near_constant_codebook():
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(1)) * 0.02
    codebooks, codes = cluster(values, k=16, method="random", seed=5)
    counts = torch.bincount(codes.long(), minlength=16)
    assert (counts - 12_500).abs().max() < 5 * 12_500**0.5
    assert codebooks.max() - codebooks.min() < 0.02 * 0.06
    for j in range(16):
        mean = values[codes == j].double().mean().item()
        assert codebooks[0, j].item() == pytest.approx(mean, rel=1e-3, abs=1e-7)
    assert not torch.equal(codes, cluster(values, k=16, method="random", seed=6)[1])


def test_spectral_separates_well_separated_clusters():
    rng = np.random.default_rng(7)
    centres = np.array([-5.0, -1.0, 2.0, 6.0])
    truth = rng.integers(0, 4, size=4000)
    values = torch.from_numpy((centres[truth] + 0.1 * rng.normal(size=4000)).astype(np.float32))
    codebooks, codes = cluster(values, k=4, method="spectral")
    assert np.array_equal(codes.numpy(), truth)
    assert np.allclose(codebooks[0].numpy(), centres, atol=0.02)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), k=st.integers(1, 9), sizes=st.lists(st.integers(1, 12), min_size=1))
def test_assign_equals_brute_force(data, k, sizes):
    # Quarter steps make exact ties and repeated codewords common.
    quarter = st.integers(-16, 16).map(lambda i: i / 4)
    n = sum(sizes)
    values = torch.tensor(data.draw(st.lists(quarter, min_size=n, max_size=n)))
    flat = data.draw(st.lists(quarter, min_size=k * len(sizes), max_size=k * len(sizes)))
    codebooks = torch.tensor(flat).view(len(sizes), k).sort(dim=1).values
    rows = codebooks.repeat_interleave(torch.tensor(sizes), dim=0)
    expected = (values.double()[:, None] - rows.double()).abs().numpy().argmin(axis=1)
    codes = assign(values, codebooks, sizes=torch.tensor(sizes))
    assert codes.dtype == torch.uint8 and np.array_equal(codes.numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("k", [2, 16, 255, 256])
@pytest.mark.parametrize("sizes", [[40_000], [20_000, 20_000], [7] * 100])
def test_assign_equals_brute_force_on_random_values(dtype, k, sizes):
    generator = torch.Generator().manual_seed(k)
    values = torch.randn(sum(sizes), generator=generator).to(dtype)
    codebooks = torch.randn(len(sizes), k, generator=generator).sort(dim=1).values
    rows = codebooks.repeat_interleave(torch.tensor(sizes), dim=0).double()
    expected = (values.double()[:, None] - rows).abs().numpy().argmin(axis=1)
    assert np.array_equal(assign(values, codebooks, sizes=torch.tensor(sizes)).numpy(), expected)


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("sizes", [[20_000], [5_000] * 4])
def test_assign_resolves_borders_between_neighbouring_float32(direction, sizes):
    """Middles of two codewords that are no float32 themselves must not be rounded past a value."""
    one = torch.tensor([1.0 * direction])
    steps = (torch.arange(8) * direction).to(torch.int32)
    neighbours = (one.view(torch.int32) + steps * direction).view(torch.float32)
    values = neighbours.repeat(sum(sizes) // 8)
    codebook = neighbours[[0, 3, 4, 7]].sort().values
    expected = (values.double()[:, None] - codebook.double()).abs().numpy().argmin(axis=1)
    codebooks = codebook.expand(len(sizes), 4)
    assert np.array_equal(assign(values, codebooks, sizes=torch.tensor(sizes)).numpy(), expected)


def test_assign_is_bounded_by_its_chunks(monkeypatch):
    values = torch.randn(5000, generator=torch.Generator().manual_seed(2))
    codebooks = torch.randn(50, 16, generator=torch.Generator().manual_seed(3)).sort(dim=1).values
    sizes = torch.full((50,), 100)
    whole = assign(values, codebooks, sizes=sizes)
    monkeypatch.setattr(scalar, "_ASSIGN_CHUNK", 37)
    assert torch.equal(whole, assign(values, codebooks, sizes=sizes))
    assert torch.equal(
        assign(values, codebooks[:1]), assign(values, codebooks[:1], sizes=torch.tensor([5000]))
    )


def test_chunking_does_not_change_results(monkeypatch):
    values = torch.randn(6000, generator=torch.Generator().manual_seed(4))
    sizes = torch.full((60,), 100)
    whole = {m: cluster(values, k=4, method=m, sizes=sizes) for m in METHODS}
    monkeypatch.setattr(scalar, "_CHUNK", 250)
    monkeypatch.setattr(scalar, "_ASSIGN_CHUNK", 170)
    monkeypatch.setattr("jlcm.clustering.points._SLICE", 1000)
    for method, (codebooks, codes) in whole.items():
        again = cluster(values, k=4, method=method, sizes=sizes)
        assert torch.equal(again[0], codebooks) and torch.equal(again[1], codes), method


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"method": "ward"}, "unknown clustering method 'ward'.*hierarchical"),
        ({"k": 0}, "k must be 1 to 256"),
        ({"k": 257}, "k must be 1 to 256"),
        ({"sizes": torch.tensor([3, 3])}, "sizes must be positive and sum to the 5 values"),
        ({"sizes": torch.tensor([6, -1])}, "sizes must be positive"),
        ({"importance": torch.ones(4)}, "importance must have the shape"),
        ({"importance": -torch.ones(5)}, "importance must be finite and non-negative"),
        ({"importance": torch.full((5,), torch.nan)}, "importance must be finite"),
        ({"values": torch.tensor([0.0, torch.nan])}, "NaN or Inf"),
        ({"values": torch.tensor([0.0, torch.inf])}, "NaN or Inf"),
        ({"values": torch.tensor([0.0, 7e4])}, "fp16 range"),
        ({"values": torch.tensor([1, 2])}, "floating"),
        ({"values": torch.empty(0)}, "non-empty"),
        ({"values": torch.ones(2, 2)}, "1-D"),
    ],
)
@pytest.mark.parametrize("method", ["kmeans", "random"])
def test_bad_input_is_refused(kwargs, message, method):
    arguments = {"values": torch.arange(5.0), "k": 2, "method": method} | kwargs
    with pytest.raises(ValueError, match=message):
        cluster(arguments.pop("values"), **arguments)


def test_assign_refuses_bad_codebooks():
    with pytest.raises(ValueError, match="ascending"):
        assign(torch.ones(3), torch.tensor([[1.0, 0.0]]))
    with pytest.raises(ValueError, match="shape"):
        assign(torch.ones(3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="1 to 256"):
        assign(torch.ones(3), torch.zeros(1, 257))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_forty_million_weights(method):
    values = (torch.randn(40_000_000, generator=torch.Generator().manual_seed(0)) * 0.02).half()
    codebooks, codes = cluster(values, k=16, method=method)
    part = slice(0, 1_000_000)
    mean = ((values[part].float() - codebooks[0, codes[part].long()]) ** 2).mean().item()
    assert mean < (5e-4 if method == "random" else 2e-5)
