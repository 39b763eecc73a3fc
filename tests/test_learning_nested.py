"""Networks that torch.fx cannot trace: kept arguments give the same inputs as whole forwards."""

from collections import Counter

import pytest
import torch
from torch import nn

import jlcm
from jlcm.hooks import stopping
from jlcm.learning.calibration import Calibration

N = 8


class Pair(nn.Module):
    """Two layers; what it returns depends on more than its arguments if it counts."""

    def __init__(self, counts: bool = False):
        super().__init__()
        self.first, self.second = nn.Linear(N, N), nn.Linear(N, N)
        self.counts, self.calls = counts, 0

    def forward(self, x, *, skips=()):
        self.calls += self.counts
        x = self.second(self.first(x).tanh() + self.calls)
        for skip in skips:
            x = x + skip
        return x.add_(1)


class Network(nn.Module):
    """Blocks with skips, one that runs twice, and a branch that keeps torch.fx out."""

    def __init__(self, counts: bool = False):
        super().__init__()
        self.stem = nn.Linear(N, N)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"left": Pair(), "right": Pair(counts)}) for _ in range(2)
        )
        self.twice = Pair()

    def forward(self, x):
        x = self.stem(x)
        if x.sum() > 1e9:
            return x
        skips = [x]
        for block in self.blocks:
            x = block["right"](block["left"](x, skips=tuple(skips)))
            skips.append(x)
        return self.twice(self.twice(x))


def calibration(model):
    torch.manual_seed(1)
    packed = jlcm.compress(model, alpha=4, init="kmeans", progress=False)
    inputs = torch.randn(24, N)
    made = Calibration(
        packed,
        model,
        inputs,
        forward_batch=10,
        memory=2**20,
        positions=1,
        held_out=0.1,
        seed=0,
        device=torch.device("cpu"),
    )
    return made, packed, inputs


def build(**options):
    torch.manual_seed(0)
    return Network(**options).eval()


def whole(model, module, batch):
    with torch.no_grad(), stopping(model.get_submodule(module)) as found:
        model(batch)
    return found[0][0][0]


def test_layers_are_given_what_whole_forwards_give_them():
    model = build()
    made, packed, inputs = calibration(model)
    assert made.nodes is None and len(made.layers) == 11
    for layer in made.layers:
        for batch, given in zip(inputs.split(10), made._arguments(layer), strict=True):
            for network, ((x,), kwargs) in zip((packed, model), given, strict=True):
                assert torch.equal(x, whole(network, layer.module, batch)) and not kwargs


def test_modules_around_a_layer_run_alone():
    model = build()
    made, _, inputs = calibration(model)
    runs = Counter()
    for name, module in model.named_modules():
        if name:
            module.register_forward_pre_hook(lambda *_, name=name: runs.update([name]))
    asked = [layer.module for layer in made.layers]
    last = asked.index("blocks.1.right.second")
    for layer in made.layers[: last + 1]:
        list(made._arguments(layer))
    batches = len(inputs.split(10))
    # Before its own layers, its arguments and their check; none of it for later ones.
    assert runs["blocks.0.left"] < 16 * batches
    before = runs["blocks.0.left"]
    list(made._arguments(made.layers[last]))
    assert runs["blocks.0.left"] == before


def test_modules_that_remember_are_not_run_alone():
    made, _, _ = calibration(build(counts=True))
    for layer in made.layers:
        list(made._arguments(layer))
        kept = [name for name, _, _ in made._nested._kept]
        assert not any("right" in name for name in kept)


def test_a_layer_that_does_not_run_says_so():
    model = build()
    made, _, _ = calibration(model)
    with pytest.raises(NotImplementedError, match="does not run on every calibration batch"):
        list(made._nested("blocks.0"))
