"""Small networks with batch norms, and how they look once folded, for the tests of methods."""

import copy

import torch
from conftest import randomise
from torch import Tensor, nn

from jlcm.fold import fold_batch_norms, norms_after_layers


def stack(activation: type[nn.Module] = nn.ReLU6, seed: int = 0) -> nn.Module:
    """Convolution, depthwise, pointwise and linear layers in a row; (N, 3, 8, 8) inputs."""
    torch.manual_seed(seed)
    return randomise(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            activation(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
            nn.BatchNorm2d(8),
            activation(),
            nn.Conv2d(8, 6, 1),
            nn.BatchNorm2d(6),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 5),
        ),
        seed,
    )


X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def folded(model: nn.Module) -> tuple[nn.Module, dict[str, tuple[Tensor, Tensor]]]:
    """A folded copy and the statistics that its norms had."""
    model, norms = copy.deepcopy(model), {}
    for norm, layer in norms_after_layers(model).items():
        module = model.get_submodule(norm)
        norms[layer] = module.bias.detach().clone(), module.weight.detach().abs()
    fold_batch_norms(model)
    return model, norms


def off(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().norm() / other.detach().norm())


class Net(nn.Module):
    """Layers as attributes, the forward given as a function."""

    def __init__(self, forward, **layers: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            self.add_module(name, layer)
        randomise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conv(groups: int = 1, width: int = 4) -> nn.Conv2d:
    return nn.Conv2d(4, width, 1, groups=groups)


def two(forward, **layers: nn.Module) -> nn.Module:
    return Net(forward, a=conv(), b=conv(), **layers)
