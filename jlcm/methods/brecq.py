"""BRECQ: AdaRound's rounding, learned for the layers of a block together.

Li et al., "BRECQ: Pushing the limit of post-training quantization by block reconstruction", 2021.
Blocks run between tensors that alone are live, such as residual blocks. In the paper the first and
the last layer have 8 bits: `first_last="int8"`.
"""

import copy
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from jlcm.config import Invalid, check_choice
from jlcm.layers import STORE, stored_tensors
from jlcm.learning.activations import Tensors
from jlcm.learning.calibration import Calibration
from jlcm.learning.forward import PRECISIONS, distribution_of, divergence, logits_of, precision
from jlcm.learning.partition import Block, BlockOutputs, find_blocks
from jlcm.learning.report import collector, in_brief
from jlcm.learning.sequential import LayerResult
from jlcm.methods.adaround import AdaRound, adaround
from jlcm.methods.network import Network
from jlcm.methods.reconstruction import (
    Rounding,
    Steps,
    calibration_of,
    reconstruct,
    unreached,
)
from jlcm.uniform import UniformWeight

LOSSES = ("mse", "fisher")


@dataclass(frozen=True, kw_only=True)
class Brecq(Steps):
    """Options of BRECQ. The paper takes 20,000 steps of 0.001.

    Attributes:
        iterations: gradient steps for each block.
        lr: step size of Adam for the roundings.
        loss: "mse" (its public code's default) or "fisher": errors of a block's output weighted by
            the squared gradient of the divergence of the network's output.
        weights: weights of a block at least; shorter runs are joined to the next.
        precision: of training: "bf16" (autocast), "fp32", or "auto" (bf16 where the processor
            has it).
    """

    iterations: int = 500
    lr: float = 0.03
    loss: str = "mse"
    weights: int = 2
    precision: str = "auto"

    def __post_init__(self) -> None:
        """Check the choices."""
        super().__post_init__()
        check_choice("loss", self.loss, LOSSES)
        check_choice("precision", self.precision, PRECISIONS)
        if self.weights < 1:
            raise Invalid(f"weights={self.weights} must be at least 1")


def brecq(
    packed: nn.Module, reference: nn.Module, network: Network, options: Brecq
) -> list[LayerResult]:
    """Learn the rounding of every block in forward order, in place.

    Args:
        packed: network with uniform weights, rounded to nearest.
        reference: its full-precision original.
        network: calibration inputs, seed and device.
        options: of the method.

    Returns:
        One result for each block; its errors are those on the calibration inputs.

    Raises:
        ValueError: calibration set empty or too small, or a loss that is not finite.
    """
    calibration = calibration_of(packed, reference, network, positions=1, memory=options.memory)
    if calibration.nodes is None:
        network.notes.append("the network cannot be traced into blocks: layer by layer (AdaRound)")
        return adaround(packed, reference, network, AdaRound(memory=options.memory))
    twin = copy.deepcopy(packed).requires_grad_(False)
    weights, store = dict(reference.named_parameters()), dict(stored_tensors(packed))
    results, finish = collector(network.on_result)
    blocks = find_blocks(calibration, options.weights)
    bar = tqdm(blocks, desc="reconstruct", unit="block", disable=not network.progress, leave=False)
    for block in bar:
        began = time.perf_counter()
        # Ends in 8 bits stay as they are.
        held = [name for name in block.weights if isinstance(store[name], UniformWeight)]
        if not held:
            continue
        roundings = []
        for name in held:
            rounding = Rounding(store[name], weights[name]).to(network.device)
            owner, _, tensor = name.rpartition(".")
            twin.get_submodule(owner)._modules[STORE][tensor] = rounding
            roundings.append((rounding, store[name]))
        learner = _Block(calibration, block, twin, options, network.seed)
        result = reconstruct(
            block.name, roundings, loss=learner.loss, error=learner.error, options=options
        )
        result.seconds = time.perf_counter() - began
        finish(result)
        bar.set_postfix_str(in_brief(result))
    for result in unreached(calibration):
        finish(result)
    return results


class _Block:
    """Inputs and wanted outputs of a block."""

    def __init__(
        self, calibration: Calibration, block: Block, twin: nn.Module, options: Brecq, seed: int
    ) -> None:
        self.calibration, self.block, self.options = calibration, block, options
        self.modules, self.end = dict(twin.named_modules()), calibration.nodes[block.stop - 1]
        self.generator = torch.Generator().manual_seed(seed)
        self.order: list[int] = []
        self.targets = BlockOutputs(calibration, block)
        self.importance: Tensors | None = None
        if options.loss == "fisher":
            self.importance = Tensors(calibration.memory)
            for number in range(len(calibration.inputs)):
                self.importance[number] = self._gradients(number)

    def loss(self, step: int) -> Tensor:
        """Squared error of a batch, summed over channels, its mean over images and positions."""
        if not self.order:
            count = len(self.calibration.inputs)
            self.order = torch.randperm(count, generator=self.generator).tolist()
        number = self.order.pop()
        state = self.calibration.state(number, model=0)
        with precision(self.options.precision, self.calibration.device):
            self.calibration.run(0, state, self.block.start, self.block.stop, modules=self.modules)
            squared = (state[self.end].float() - self._on_device(self.targets[number])).square()
            if self.importance is not None:
                squared = squared * self._on_device(self.importance[number])
            # Channels are the second dimension of images, the last of tokens.
            return squared.sum(1 if squared.dim() == 4 else -1).mean()

    @torch.no_grad()
    def error(self) -> float:
        """Squared error of the packed block on all inputs over the variance of the targets."""
        total = count = 0.0
        for number in range(len(self.calibration.inputs)):
            state, target = self.calibration.state(number, model=0), self.targets[number]
            self.calibration.run(0, state, self.block.start, self.block.stop)
            difference = state[self.end].float() - self._on_device(target)
            total, count = total + float(difference.square().sum()), count + target.numel()
        return total / count / self.targets.variance

    def _gradients(self, number: int) -> Tensor:
        """Squared gradient of the divergence for each output of the block, (|g| + 1)^2."""
        calibration, nodes = self.calibration, self.calibration.nodes
        state = self.calibration.state(number, model=0)
        calibration.run(0, state, self.block.start, self.block.stop)
        state[self.end] = output = state[self.end].detach().requires_grad_(True)
        whole = self.calibration.state(number, model=1)
        with torch.no_grad():
            calibration.run(1, whole, self.block.start, len(nodes))
        calibration.run(0, state, self.block.stop, len(nodes))
        logits, target = (logits_of(calibration.output(s), "the network") for s in (state, whole))
        distribution = distribution_of(calibration.reference)
        loss = divergence(logits, target, distribution=distribution) * len(output)
        (gradient,) = torch.autograd.grad(loss, output)
        return (gradient.abs() + 1).square().cpu()

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.calibration.device)
