"""Sparse outliers on top of codebooks: bytes, choice, and the network that runs."""

import copy

import pytest
import torch
from conftest import randomise
from torch import nn

import jlcm
from jlcm.expanded import ExpandedWeight, outlier_bytes
from jlcm.layers import stored_tensors
from jlcm.outliers import add_outliers


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    randomise(model)
    with torch.no_grad():  # heavy tails, which codebooks serve badly
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.mul_(module.weight.abs().pow(2) * 40)
    return model.eval()


X = torch.randn(64, 3, 10, 10, generator=torch.Generator().manual_seed(0))


def compress(model, alpha=4.5, **options):
    return jlcm.compress(model, alpha=alpha, progress=False, **options)


def outliers_of(packed):
    return {n: s for n, s in stored_tensors(packed) if isinstance(s, ExpandedWeight)}


@pytest.mark.parametrize("share", [0.05, 0.2])
def test_bytes_stay_within_the_goal_and_are_used(share):
    packed = compress(network(), outliers=share)
    size = jlcm.footprint(packed)
    assert 4.5 <= size.alpha_layers < 1.03 * 4.5
    goal = size.reference_layers / 4.5
    assert 0 < size.outliers <= share * goal + 100
    each = {n: outlier_bytes(s.positions()) for n, s in outliers_of(packed).items()}
    assert size.outliers == sum(each.values())
    assert sum(layer.outliers > 0 for layer in size.layers) == len(each)


def test_saved_and_loaded_network_computes_the_same(tmp_path):
    model = network()
    packed = compress(model, outliers=0.1)
    jlcm.save(packed, tmp_path / "a.safetensors")
    loaded = jlcm.load(tmp_path / "a.safetensors", model=network(1))
    assert torch.equal(loaded(X), packed(X))
    on_disk = jlcm.footprint(tmp_path / "a.safetensors")
    assert on_disk.payload == jlcm.footprint(packed).payload


def test_largest_errors_are_corrected():
    model = network()
    packed = compress(model, reorder="none")
    decoded = {n: s().clone() for n, s in stored_tensors(packed) if n.endswith("weight")}
    add_outliers(packed, model, 400, {})
    for name, held in outliers_of(packed).items():
        weight = model.get_parameter(name)
        error = (weight - decoded[name]).flatten().abs()
        chosen = torch.zeros_like(error, dtype=torch.bool)
        chosen[held.positions()] = held.values != 0  # zeros fill wide gaps
        assert error[chosen].min() >= error[~chosen].max()
        after = (weight - held()).flatten().abs()
        assert after[chosen].max() < 1e-3 * weight.abs().max()
        assert torch.equal(after[~chosen], error[~chosen])


def test_importance_decides():
    model = network()
    packed = compress(model, reorder="none")
    names = [n for n, s in stored_tensors(packed) if hasattr(s, "codes")]
    importance = {n: torch.zeros_like(model.get_parameter(n)) for n in names}
    importance["8.weight"] += 1
    add_outliers(packed, model, 120, importance)
    assert set(outliers_of(packed)) == {"8.weight"}


def test_error_counts_the_scale_of_the_norm_that_follows():
    model = network()
    packed = compress(model, reorder="none")
    halved = copy.deepcopy(packed)
    store = dict(stored_tensors(halved))
    store["1.weight"].values.div_(2)
    store["0.weight"].scales.mul_(2)
    for candidate in (packed, halved):
        add_outliers(candidate, model, 300, {})
    one, two = (outliers_of(p)["0.weight"] for p in (packed, halved))
    assert torch.equal(one.positions(), two.positions())
    assert torch.allclose(2 * one.values, two.values, rtol=2e-3)


def test_learning_and_distillation_go_around_them():
    model, other = network(), torch.randn(64, 3, 10, 10, generator=torch.Generator().manual_seed(1))
    options = {"alpha": 7.5, "outliers": 0.1, "calibration": X, "allocation": "auto"}
    learned = compress(model, learn=jlcm.Learn(), **options)
    distilled = compress(model, learn=jlcm.Learn(), distill=jlcm.Distill(lr=4e-3), **options)
    assert distilled.learning[-1].best_epoch > 0
    for name, held in outliers_of(distilled).items():
        before = outliers_of(learned)[name]
        assert torch.equal(held.positions(), before.positions())
        assert torch.equal(held.values, before.values)
        assert torch.equal(held.base.codes, before.base.codes)
    moved = [
        not torch.equal(held.base.codebooks, outliers_of(learned)[name].base.codebooks)
        for name, held in outliers_of(distilled).items()
    ]
    assert any(moved)
    with torch.no_grad():
        errors = [float((p(other) - model(other)).square().mean()) for p in (learned, distilled)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_impossible_parts_are_refused(share):
    with pytest.raises(ValueError, match="outliers"):
        compress(network(), outliers=share)
    with pytest.raises(ValueError, match="alpha"):
        compress(network(), alpha=15, outliers=0.5)
