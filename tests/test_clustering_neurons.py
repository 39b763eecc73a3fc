"""Row ordering: always a permutation, and planted clusters come out contiguous."""

import pytest
import torch

from jlcm.clustering import neurons
from jlcm.clustering.neurons import MAX_CLUSTERS, order_rows
from jlcm.clustering.scalar import METHODS

INFORMED = [m for m in METHODS if m != "random"]


def planted(
    rows: int, width: int, clusters: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shuffled rows around well separated directions, and the cluster of each row."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, width, generator=generator)
    truth = torch.randperm(rows, generator=generator) % clusters
    noise = 0.02 * torch.randn(rows, width, generator=generator)
    return centres[truth] + noise, truth


def runs(labels: torch.Tensor) -> int:
    return len(torch.unique_consecutive(labels))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("features", ["weights", "quantiles"])
@pytest.mark.parametrize("normalize", [False, True])
def test_order_is_a_deterministic_permutation(method, features, normalize):
    matrix = torch.randn(50, 12, generator=torch.Generator().manual_seed(1))
    matrix[7] = 0
    matrix[31] = 0
    options = dict(clusters=6, method=method, features=features, normalize=normalize, seed=4)
    order = order_rows(matrix, **options)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(50))
    assert torch.equal(order, order_rows(matrix, **options))
    assert torch.equal(order, order_rows(matrix.double(), **options))


@pytest.mark.parametrize("method", INFORMED)
@pytest.mark.parametrize("normalize", [False, True])
def test_planted_clusters_become_contiguous(method, normalize):
    matrix, truth = planted(120, 40, 5)
    order = order_rows(matrix, clusters=5, method=method, normalize=normalize)
    assert runs(truth) > 20
    assert runs(truth[order]) == 5


@pytest.mark.parametrize("method", INFORMED)
def test_normalising_ignores_the_norm_of_rows(method):
    matrix, truth = planted(90, 30, 3, seed=2)
    scale = torch.logspace(-2, 2, 90)[
        torch.randperm(90, generator=torch.Generator().manual_seed(0))
    ]
    order = order_rows(matrix * scale[:, None], clusters=3, method=method, normalize=True)
    assert runs(truth[order]) == 3


@pytest.mark.parametrize("method", INFORMED)
def test_quantiles_compare_distributions_not_positions(method):
    generator = torch.Generator().manual_seed(3)
    truth = torch.randperm(60, generator=generator) % 3
    matrix = (
        torch.randn(60, 400, generator=generator) * torch.tensor([0.1, 1.0, 5.0])[truth][:, None]
    )
    order = order_rows(matrix, clusters=3, method=method, features="quantiles")
    assert runs(truth[order]) == 3


@pytest.mark.parametrize("method", INFORMED)
def test_clusters_are_sorted_by_mean_and_rows_by_norm(method):
    matrix, truth = planted(80, 30, 4, seed=5)
    order = order_rows(matrix, clusters=4, method=method)
    means = [
        matrix[truth == label].mean().item() for label in torch.unique_consecutive(truth[order])
    ]
    assert means == sorted(means)
    for label in range(4):
        norms = matrix[order[truth[order] == label]].double().norm(dim=1)
        assert (norms.diff() >= 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_one_cluster_sorts_by_norm_and_one_per_row_by_mean(method, monkeypatch):
    monkeypatch.setattr(neurons, "_cluster_rows", None)  # neither case may call a clusterer
    matrix = torch.randn(20, 8, generator=torch.Generator().manual_seed(6))
    order = order_rows(matrix, clusters=1, method=method)
    assert torch.equal(order, matrix.double().norm(dim=1).argsort())
    for clusters in (20, 21, 10_000):
        order = order_rows(matrix, clusters=clusters, method=method)
        assert torch.equal(order, matrix.double().mean(dim=1).argsort())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("error")
def test_zero_and_repeated_rows(method):
    zeros = order_rows(torch.zeros(30, 4), clusters=5, method=method)
    assert zeros.sort().values.tolist() == list(range(30))
    if method != "random":
        assert zeros.tolist() == list(range(30))  # ties keep their order
    few = torch.tensor([[1.0, 0.0], [0.0, -1.0]]).repeat(10, 1)
    order = order_rows(few, clusters=4, method=method, normalize=True)
    assert order.sort().values.tolist() == list(range(20))
    if method != "random":
        assert order.tolist() == [*range(1, 20, 2), *range(0, 20, 2)]
    mostly = torch.zeros(40, 6)
    mostly[:8] = torch.randn(8, 6, generator=torch.Generator().manual_seed(7))
    for clusters in (2, 5, 8):
        order = order_rows(mostly, clusters=clusters, method=method)
        assert order.sort().values.tolist() == list(range(40))


@pytest.mark.parametrize("method", METHODS)
def test_number_of_clusters_is_capped(method, monkeypatch):
    seen = []
    original = neurons._labels
    monkeypatch.setattr(
        neurons,
        "_labels",
        lambda rows, count, *rest: seen.append(count) or original(rows, count, *rest),
    )
    matrix = torch.randn(300, 3, generator=torch.Generator().manual_seed(8))
    order = order_rows(matrix, clusters=1000, method=method)
    assert seen == [MAX_CLUSTERS]
    assert torch.equal(order.sort().values, torch.arange(300))


@pytest.mark.parametrize("method", METHODS)
def test_many_rows_are_summarised_first(method, monkeypatch):
    monkeypatch.setattr(neurons, "MAX_ROWS", 200)
    monkeypatch.setattr(neurons, "MAX_SPECTRAL_ROWS", 200)
    monkeypatch.setattr(neurons, "CENTRES", 100)
    matrix, truth = planted(1000, 20, 4, seed=9)
    order = order_rows(matrix, clusters=4, method=method)
    assert torch.equal(order.sort().values, torch.arange(1000))
    if method != "random":
        assert runs(truth[order]) == 4


def test_more_than_4096_rows():
    matrix, truth = planted(5000, 8, 4, seed=10)
    order = order_rows(matrix, clusters=4)
    assert torch.equal(order.sort().values, torch.arange(5000))
    assert runs(truth[order]) == 4


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"method": "ward"}, "unknown clustering method"),
        ({"features": "moments"}, "unknown features"),
        ({"clusters": 0}, "at least 1"),
        ({"matrix": torch.ones(3)}, "2-D"),
        ({"matrix": torch.ones(0, 3)}, "non-empty"),
        ({"matrix": torch.tensor([[1.0, torch.nan]])}, "NaN or Inf"),
    ],
)
def test_bad_input_is_refused(kwargs, message):
    arguments = {"matrix": torch.ones(4, 3), "clusters": 2} | kwargs
    with pytest.raises(ValueError, match=message):
        order_rows(arguments.pop("matrix"), **arguments)
