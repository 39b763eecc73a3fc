"""Which layers DFQ equalises, and that rescaling them preserves the function."""

import copy

import pytest
import torch
from conftest import randomise
from folding import Net, X, conv, folded, off, stack, two
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import mobilenet_v2

from jlcm.layers import unclip
from jlcm.methods.chains import Chains, Pair
from jlcm.methods.dfq import equalise
from jlcm.quantize import quantize

STACK = [("0", "3"), ("3", "6"), ("6", "10")]


def equalised(model: nn.Module) -> tuple[nn.Module, nn.Module, list[Pair]]:
    """A folded copy with plain ReLU, another that is equalised, and the pairs."""
    reference, norms = folded(model)
    pairs = Chains(reference, norms).pairs()
    unclip(reference, [name for pair in pairs for name in pair.clipped])
    other = copy.deepcopy(reference)
    equalise(other, pairs, norms)
    return reference, other, pairs


def names(pairs: list[Pair]) -> list[tuple[str, str]]:
    return [(pair.first, pair.second) for pair in pairs]


def ranges(model: nn.Module, pair: Pair) -> tuple[Tensor, Tensor]:
    """Largest magnitudes of a pair's channels, one channel after another."""
    first, second = model.get_submodule(pair.first), model.get_submodule(pair.second)
    depthwise = getattr(second, "groups", 1) > 1
    ours, theirs = [], []
    for i in range(len(first.weight)):
        ours.append(first.weight[i].abs().max())
        theirs.append((second.weight[i] if depthwise else second.weight[:, i]).abs().max())
    return torch.stack(ours), torch.stack(theirs)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Identity])
def test_function_is_preserved_and_ranges_are_equal(activation):
    model = stack(activation)
    with torch.no_grad():
        model[0].weight *= torch.logspace(-2, 2, 8).view(-1, 1, 1, 1)  # what equalising is for
    reference, other, pairs = equalised(model)
    assert names(pairs) == STACK
    assert off(other(X), reference(X)) <= 1e-5
    assert (other[0].weight - reference[0].weight).norm() > 0.1 * reference[0].weight.norm()
    for pair in pairs:
        ours, theirs = ranges(other, pair)
        assert torch.allclose(ours, theirs, rtol=1e-3)
    assert all(p.rectified == (activation in (nn.ReLU, nn.ReLU6)) for p in pairs[:2])
    assert [p.clipped for p in pairs[:2]] == (
        [("2",), ("5",)] if activation is nn.ReLU6 else [(), ()]
    )
    if activation is not nn.ReLU6:
        assert off(other(X), model(X)) <= 1e-5


def test_statistics_are_rescaled_along():
    model = stack(nn.ReLU)
    other, norms = folded(model)
    (mean, deviation), before = norms["0"], other[0].weight.detach().clone()
    equalise(other, Chains(other, norms).pairs(), norms)
    # The first layer has no columns that are rescaled.
    factor = (other[0].weight.detach() / before).flatten(1).mean(1)
    assert (factor - 1).abs().max() > 0.1
    assert torch.allclose(norms["0"][0], mean * factor, rtol=1e-4)
    assert torch.allclose(norms["0"][1], deviation * factor, rtol=1e-4)


def test_dead_and_extreme_channels_stay_finite():
    model = stack(nn.ReLU)
    with torch.no_grad():
        model[0].weight[0] = 0
        model[0].weight[1] *= 1e-12
        model[3].weight[2] = 0
        model[6].weight[:, 3] = 0
    reference, other, _ = equalised(model)
    assert off(other(X), reference(X)) <= 1e-5
    assert all(p.isfinite().all() for p in other.parameters())
    assert other[0].bias.abs().max() <= 65504
    assert quantize(model, "dfq", progress=False)(X).isfinite().all()


def test_mobilenet_v2():
    torch.manual_seed(0)
    model = randomise(mobilenet_v2(num_classes=10))
    images = torch.randn(2, 3, 32, 32)
    reference, other, pairs = equalised(model)
    # Stem, depthwise and projection; expansion, depthwise and projection of 16 blocks; projections
    # into the next layer where no sum is between: of the first block and the last; the classifier.
    assert len(pairs) == 2 + 2 * 16 + 2 + 1
    assert off(other(images), reference(images)) <= 1e-5


CASES = {
    "functional relu": (two(lambda m, x: m.b(functional.relu(m.a(x)))), True),
    "largest pooling": (
        two(lambda m, x: m.b(functional.max_pool2d(m.a(x).relu(), 3, 1, 1))),
        True,
    ),
    "functional relu6": (two(lambda m, x: m.b(functional.relu6(m.a(x)))), False),
    "silu": (two(lambda m, x: m.b(m.s(m.a(x))), s=nn.SiLU()), False),
    "gelu": (two(lambda m, x: m.b(functional.gelu(m.a(x)))), False),
    "hard swish": (two(lambda m, x: m.b(m.s(m.a(x))), s=nn.Hardswish()), False),
    "output used twice": (two(lambda m, x: m.b((y := m.a(x)).relu()) + y), False),
    "activation used twice": (two(lambda m, x: m.b(y := m.a(x).relu()) + y), False),
    "first called twice": (two(lambda m, x: m.b(m.a(x)) + m.a(x)), False),
    "second called twice": (two(lambda m, x: m.b(m.a(x)) + m.b(x)), False),
    "relu6 used twice": (two(lambda m, x: m.b(m.s(m.a(m.s(x)))), s=nn.ReLU6()), False),
    "tensor read": (two(lambda m, x: m.b(m.a(x)) + m.a.weight.sum()), False),
    "sum": (two(lambda m, x: m.b(m.a(x) + x)), False),
    "scalar added": (two(lambda m, x: m.b(m.a(x) + 1)), False),
    "norm between": (two(lambda m, x: m.b(m.n(m.a(x).relu())), n=nn.BatchNorm2d(4)), False),
    "layer norm between": (two(lambda m, x: m.b(m.n(m.a(x))), n=nn.LayerNorm(5)), False),
    "grouped first": (Net(lambda m, x: m.b(m.a(x)), a=conv(2), b=conv()), False),
    "grouped second": (Net(lambda m, x: m.b(m.a(x)), a=conv(), b=conv(2)), False),
    "depthwise multiplier": (Net(lambda m, x: m.b(m.a(x)), a=conv(), b=conv(4, 8)), False),
    "two channels to one": (
        Net(lambda m, x: m.b(m.a(x)), a=conv(), b=nn.Conv2d(4, 2, 1, groups=2)),
        False,
    ),
    "linear along the width": (
        Net(lambda m, x: m.b(m.a(x)), a=nn.Conv2d(4, 5, 1), b=nn.Linear(5, 5)),
        False,
    ),
    "whole map flattened": (
        Net(lambda m, x: m.b(m.a(x).flatten(1)), a=conv(), b=nn.Linear(100, 3)),
        False,
    ),
    "mean of the map": (
        Net(lambda m, x: m.b(m.a(x).relu().mean((2, 3))), a=conv(), b=nn.Linear(4, 3)),
        True,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_only_what_is_safe_is_equalised(case):
    model, expected = CASES[case]
    x = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    reference, other, pairs = equalised(model)
    assert names(pairs) == ([("a", "b")] if expected else [])
    assert off(other(x), model(x)) <= 1e-5


def test_layers_with_a_shared_weight_are_left_alone():
    model = two(lambda m, x: m.b(m.a(x)), c=conv())
    model.c.weight = model.b.weight
    assert equalised(model)[2] == []
