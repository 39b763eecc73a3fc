"""Outputs that are logits, or means of normal distributions: divergence, Fisher information."""

import copy

import pytest
import torch
from test_sensitivity import estimate, network, normal, weights_of

from jlcm.learning import forward
from jlcm.learning.forward import CATEGORICAL, GAUSSIAN, distribution_of, divergence, divergences


def gaussian(model):
    model.output_distribution = "gaussian"
    return model


@pytest.mark.parametrize("rows_at_once", [1, 4, 100])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_divergence_of_logits_and_its_gradient_are_those_of_torch(
    rows_at_once, temperature, monkeypatch
):
    monkeypatch.setattr(forward, "_MOST_LOGITS", 5 * rows_at_once)
    output, target = normal(2, 3, 5, seed=2), normal(2, 3, 5, seed=3)
    pair = [x.double().requires_grad_() for x in (target, output)]
    categories = (torch.distributions.Categorical(logits=x / temperature) for x in pair)
    expected = torch.distributions.kl_divergence(*categories).mean() * temperature**2
    expected.backward()
    output.requires_grad_()
    found = divergence(output, target, temperature)
    found.backward()
    torch.testing.assert_close(found, expected.float())
    torch.testing.assert_close(output.grad, pair[1].grad.float())


def test_divergences_of_16_bit_logits_are_summed_in_float32():
    output, target = (normal(4, 1000, seed=seed).bfloat16() for seed in (2, 3))
    expected = divergences(output.float(), target.float())
    torch.testing.assert_close(divergences(output, target), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("many", [0, 100])
def test_gradients_have_the_fisher_information_as_second_moment(many, monkeypatch):
    monkeypatch.setattr(forward, "_MANY_CLASSES", many)
    shares = torch.tensor([0.0, 0.1, 0.0, 0.6, 0.05, 0.25, 0.0])
    logits = shares.log().clamp(min=-200).expand(40_000, -1).clone().requires_grad_()
    CATEGORICAL.drawn(logits, torch.Generator().manual_seed(0)).backward()
    found = logits.grad.T @ logits.grad / len(logits)
    expected = shares.diag() - shares[:, None] * shares
    torch.testing.assert_close(logits.grad.mean(0), 0 * shares, atol=0.01, rtol=0)
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0)


def test_signs_estimate_with_less_variance_than_labels(monkeypatch):
    logits = torch.tensor([5.0, *[0.0] * 6]).expand(20_000, -1).clone().requires_grad_()
    spreads = []
    for many in (0, 100):  # signs, labels
        monkeypatch.setattr(forward, "_MANY_CLASSES", many)
        logits.grad = None
        CATEGORICAL.drawn(logits, torch.Generator().manual_seed(0)).backward()
        spreads.append(logits.grad.square().sum(1).std())
    assert spreads[0] < 0.5 * spreads[1]


def test_divergence_of_normal_distributions_is_that_of_torch():
    output, target = normal(6, 5, seed=2), normal(6, 5, seed=3)
    normals = (torch.distributions.Normal(means, 1.0) for means in (target, output))
    expected = torch.distributions.kl_divergence(*normals).sum(1)
    torch.testing.assert_close(divergences(output, target, GAUSSIAN), expected)
    for temperature in (1.0, 3.0):
        found = divergence(output, target, temperature, GAUSSIAN)
        torch.testing.assert_close(found, expected.mean())


def test_fisher_information_of_normal_distributions():
    """The diagonal of J^T J, from the Jacobian of all outputs."""
    model, x = gaussian(network(6, 8, 4)), normal(48, 6)
    weights = weights_of(model)
    expected = {name: torch.zeros_like(w) for name, w in weights.items()}
    for row in x:
        for output in model(row):
            gradients = torch.autograd.grad(output, list(weights.values()), retain_graph=True)
            for total, gradient in zip(expected.values(), gradients, strict=True):
                total += gradient.square() / len(x)
    found = estimate(model, x, runs=400)
    for name, values in expected.items():
        assert float((found[name] - values).norm() / values.norm()) < 0.1


def test_small_changes_of_means_diverge_as_predicted():
    model, x = gaussian(network(6, 8, 4)), normal(64, 6)
    fisher, changed = estimate(model, x, runs=50), copy.deepcopy(model)
    parameter = changed[2].weight
    change = 1e-3 * normal(*parameter.shape)
    with torch.no_grad():
        parameter += change
        found = divergence(changed(x), model(x), distribution=distribution_of(model))
    # The last layer's rows are independent; within a row the diagonal is a part of the whole.
    hidden = model[:2](x).detach()
    gram = hidden.T @ hidden / len(x)
    torch.testing.assert_close(found, 0.5 * torch.trace(change @ gram @ change.T))
    torch.testing.assert_close(fisher["2.weight"][0], gram.diagonal(), rtol=0.2, atol=0.02)
