"""Networks with random weights, for what does not depend on their values: memory and time."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from jlcm.architecture import Architecture

#: Pixels of noise that batch norms take their statistics from, 256 images of 32 x 32.
_PIXELS = 2**18


def untrained(architecture: Architecture, size: int, *, seed: int) -> nn.Module:
    """Build a network whose values stay of order one from layer to layer.

    Args:
        architecture: the network.
        size: side of its input in pixels.
        seed: of the weights.

    Returns:
        The network on the CPU, in evaluation mode.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        module = architecture.build("cpu")
        for parameter in module.parameters():
            if parameter.dim() > 1 and not parameter.any():  # a head of zeros gives no outputs
                nn.init.normal_(parameter, std=0.02)
        norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
        if norms:  # with a variance of one the values would vanish
            momenta = [norm.momentum for norm in norms]
            for norm in norms:
                norm.train().momentum = 1.0
            module(torch.randn(max(2, _PIXELS // size**2), 3, size, size))
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.eval().momentum = momentum
    return module
