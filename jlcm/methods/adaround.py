"""AdaRound: learn for each weight whether it is rounded up or down, layer by layer.

Nagel et al., "Up or down? Adaptive rounding for post-training quantization", 2020. The output of a
layer, its activation included, is brought near the full-precision one, with inputs from the network
as quantised so far. Where the paper takes whole images, each step takes a batch of positions of all
images, which is the same loss in expectation and fits a CPU.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from jlcm.config import Invalid
from jlcm.layers import stored_tensors
from jlcm.learning.calibration import Calibration, Layer
from jlcm.learning.report import collector, in_brief
from jlcm.learning.sequential import LayerResult, joined
from jlcm.methods.network import Network
from jlcm.methods.reconstruction import (
    Rounding,
    Steps,
    calibration_of,
    reconstruct,
    unreached,
)
from jlcm.methods.rtn import RTN, rtn
from jlcm.packed import StoredWeight
from jlcm.uniform import UniformWeight

#: Elements of a step's inputs at the most, as far as that leaves so many positions.
MOST_ELEMENTS, LEAST_BATCH = 2**22, 128


@dataclass(frozen=True, kw_only=True)
class AdaRound(Steps):
    """Options of AdaRound. The paper takes 10,000 to 20,000 steps of 0.001.

    Attributes:
        batch_size: positions (pixels, tokens) of a step; fewer, down to 128, for depthwise
            convolutions of many channels, whose inputs are large.
        positions: positions kept for each input of a neuron, at least 32,768 together.
    """

    batch_size: int = 512
    positions: int = 8

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for name in ("batch_size", "positions"):
            if getattr(self, name) < 1:
                raise Invalid(f"{name}={getattr(self, name)} must be at least 1")


def nearest(network: Network, options: Steps) -> dict[str, StoredWeight]:
    """Round every weight to nearest, on the grid of least error of its row."""
    return rtn(network, RTN())


def adaround(
    packed: nn.Module, reference: nn.Module, network: Network, options: AdaRound
) -> list[LayerResult]:
    """Learn the rounding of every layer in forward order, in place.

    Args:
        packed: network with uniform weights, rounded to nearest.
        reference: its full-precision original.
        network: calibration inputs, seed and device.
        options: of the method.

    Returns:
        One result for each weight; its errors are those on the calibration inputs.

    Raises:
        ValueError: calibration set empty or too small, or a loss that is not finite.
    """
    return learn_layers(packed, reference, network, options, Rounding)


def learn_layers(
    packed: nn.Module,
    reference: nn.Module,
    network: Network,
    options: AdaRound,
    rounding: Callable[[UniformWeight, Tensor], nn.Module],
) -> list[LayerResult]:
    """Layer-wise reconstruction with any kind of rounding, made from a stored weight and W."""
    calibration = calibration_of(
        packed, reference, network, positions=options.positions, memory=options.memory
    )
    weights, store = dict(reference.named_parameters()), dict(stored_tensors(packed))
    results, finish = collector(network.on_result)
    bar = tqdm(
        calibration.layers,
        desc="reconstruct",
        unit="layer",
        disable=not network.progress,
        leave=False,
    )
    for index, layer in enumerate(bar):
        stored = store[layer.name]
        if not isinstance(stored, UniformWeight):  # an end in 8 bits
            continue
        began = time.perf_counter()
        try:
            columns = _Columns(calibration, index, packed, options)
        except NotImplementedError as error:
            finish(LayerResult(name=layer.name, note=f"rounded to nearest: {error}"))
            continue
        trained = rounding(stored, weights[layer.name].to(network.device)).to(network.device)
        result = reconstruct(
            layer.name,
            [(trained, stored)],
            loss=partial(_step, columns, trained),
            error=partial(_error, columns, stored),
            options=options,
        )
        result.seconds = time.perf_counter() - began
        finish(result)
        bar.set_postfix_str(in_brief(result))
    for result in unreached(calibration):
        finish(result)
    return results


def _step(columns: "_Columns", rounding: nn.Module, step: int) -> Tensor:
    return columns.loss(rounding(), step)


def _error(columns: "_Columns", stored: UniformWeight) -> float:
    return columns.error(stored())


class _Columns:
    """Inputs of a layer and its wanted outputs, as columns in random order.

    Attributes:
        inputs: (groups, n, columns) float32.
        targets: (groups, rows, columns) float32, after the activation.
    """

    @torch.no_grad()
    def __init__(
        self, calibration: Calibration, index: int, packed: nn.Module, options: AdaRound
    ) -> None:
        layer: Layer = calibration.layers[index]
        bias = getattr(packed.get_submodule(layer.name.rpartition(".")[0]), "bias", None)
        self.activation = layer.activation or (lambda outputs: outputs)
        inputs, targets = [], []
        for x, y, *_ in calibration.pairs(index):
            each = 4 * calibration.count * x.shape[1] * (x.shape[2] + y.shape[2])
            # A quarter of the memory, because there are up to three copies for a while.
            stride = -(-x.shape[-1] // max(options.memory // 4 // each, 1))
            inputs.append(joined(x[..., ::stride]).float())
            targets.append(joined(y[..., ::stride]).float())
        count = sum(part.shape[-1] for part in inputs)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(calibration.seed))
        self.inputs = torch.cat(inputs, -1)[..., order.to(inputs[0].device)]
        self.targets = self.activation(torch.cat(targets, -1)[..., order.to(targets[0].device)])
        groups, rows = self.targets.shape[:2]
        most = MOST_ELEMENTS // (groups * self.inputs.shape[1])
        self.size = min(options.batch_size, max(most, LEAST_BATCH))
        self.bias = 0.0 if bias is None else bias.detach().float().view(groups, rows, 1)
        centred = self.targets - self.targets.mean(-1, keepdim=True)
        self.variance = max(float(centred.double().square().sum() / count), 1e-30)

    def loss(self, weight: Tensor, step: int) -> Tensor:
        """Squared error summed over channels, of the positions of a step."""
        batches = max(self.inputs.shape[-1] // self.size, 1)
        first = step % batches * self.size
        return self._error(weight, slice(first, first + self.size))

    @torch.no_grad()
    def error(self, weight: Tensor) -> float:
        """Squared error of all positions over the variance of the wanted outputs."""
        count = self.inputs.shape[-1]
        parts = [slice(i, min(i + 8 * self.size, count)) for i in range(0, count, 8 * self.size)]
        total = sum(float(self._error(weight, p)) * (p.stop - p.start) for p in parts)
        return total / count / self.variance

    def _error(self, weight: Tensor, part: slice) -> Tensor:
        groups, rows = self.targets.shape[:2]
        weight = weight.float().view(groups, rows, -1)
        outputs = self.activation(weight @ self.inputs[..., part] + self.bias)
        return (outputs - self.targets[..., part]).square().sum((0, 1)).mean()
