"""Soft k-means of scalars against the dense formula, and its gradients."""

import pytest
import torch
from torch import Tensor

from jlcm.methods.soft_kmeans import (
    LEAST_MASS,
    SoftCluster,
    attend,
    soft_kmeans,
    soft_means,
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def codewords(k: int, seed: int = 1) -> Tensor:
    return randn(k, seed=seed).sort().values


def dense_attention(weights: Tensor, codebook: Tensor, tau: float) -> Tensor:
    return (-(weights[:, None] - codebook).abs() / tau).softmax(1)


def dense(weights: Tensor, codebook: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Soft k-means as the paper writes it, with the matrix of weights by codewords."""
    attention = dense_attention(weights, codebook, tau)
    means = attention.T @ weights / attention.sum(0)
    return attention @ means, means


@pytest.mark.parametrize("tau", [1e-3, 0.05, 0.5, 10.0])
@pytest.mark.parametrize("k", [1, 2, 4, 8, 256])
def test_values_and_gradients_equal_those_of_the_dense_formula(k, tau):
    weights, codebook = randn(300).requires_grad_(), codewords(k)
    upstream = randn(300, seed=2)
    values, means = SoftCluster.apply(weights, codebook, tau)
    expected, expected_means = dense(weights, codebook, tau)
    (found,) = torch.autograd.grad(values, weights, upstream)
    (gradient,) = torch.autograd.grad(expected, weights, upstream)
    torch.testing.assert_close(values, expected, rtol=1e-7, atol=1e-7)
    seen = dense_attention(weights, codebook, tau).sum(0) > LEAST_MASS
    torch.testing.assert_close(means[seen], expected_means[seen], rtol=1e-8, atol=1e-8)
    assert torch.equal(means[~seen], codebook[~seen])
    torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-4)
    assert not means.requires_grad


def test_gradients_agree_with_finite_differences():
    weights = randn(30).requires_grad_()
    codebook = codewords(4)
    assert torch.autograd.gradcheck(lambda w: SoftCluster.apply(w, codebook, 0.3)[0], weights)


def test_attention_is_a_matrix_of_proportions():
    weights, codebook = randn(50), codewords(5)
    attention = attend(weights, codebook, 0.4)
    columns = torch.stack([attention.mix(unit) for unit in torch.eye(5).double()], 1)
    torch.testing.assert_close(columns, dense_attention(weights, codebook, 0.4))
    torch.testing.assert_close(attention.pool(weights), columns.T @ weights)
    torch.testing.assert_close(columns.sum(1), torch.ones(50).double())


def test_float32_weights_lose_little():
    weights, codebook = randn(5000), codewords(8)
    exact, _ = SoftCluster.apply(weights, codebook, 0.05)
    values, means = SoftCluster.apply(weights.float(), codebook, 0.05)
    assert values.dtype == torch.float32 and means.dtype == torch.float64
    torch.testing.assert_close(values.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [2, 4, 8])
def test_without_temperature_a_step_is_lloyds(k):
    weights, codebook = randn(500), codewords(k)
    nearest = (weights[:, None] - codebook).abs().argmin(1)
    expected = torch.stack([weights[nearest == i].mean() for i in range(k)])
    means, inverse = soft_means(weights, codebook, attend(weights, codebook, 1e-9))
    torch.testing.assert_close(means, expected)
    torch.testing.assert_close(1 / inverse, nearest.bincount(minlength=k).double())
    values, _ = SoftCluster.apply(weights, codebook, 1e-9)
    torch.testing.assert_close(values, expected[nearest])


def test_codewords_without_weights_and_equal_codewords_stay():
    weights = torch.tensor([-1.0, -0.9, 1.1])
    codebook = torch.tensor([-1.0, 0.2, 1.0, 50.0]).double()
    found = soft_kmeans(weights, codebook, 1e-4, 10)
    torch.testing.assert_close(found, torch.tensor([-0.95, 0.2, 1.1, 50.0]).double())
    equal = torch.full((4,), 0.25).double()
    values, means = SoftCluster.apply(torch.full((6,), 0.25), equal, 1e-12)
    assert torch.equal(values, torch.full((6,), 0.25)) and torch.equal(means, equal)


def test_soft_kmeans_ends_where_another_step_changes_nothing():
    weights, codebook = randn(2000), codewords(4)
    found = soft_kmeans(weights, codebook, 0.05, 10_000)
    again, _ = soft_means(weights, found, attend(weights, found, 0.05))
    gap = float(codebook[-1] - codebook[0]) / 3
    assert (again - found).abs().max() <= 2e-3 * gap
    assert (found.diff() > 0).all()
    assert torch.equal(soft_kmeans(weights, codebook, 0.05, 0), codebook)
