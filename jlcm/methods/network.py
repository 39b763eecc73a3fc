"""What a method is given: a network to quantise, and all that is known about it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from jlcm.learning.report import OnResult, ignore
from jlcm.packed import StoredWeight


@dataclass
class Network:
    """A network that a method quantises.

    Attributes:
        model: a copy that may be changed, in evaluation mode; batch norms that can be are folded
            where the method wants it, and apply nothing any more.
        weights: the tensors to quantise by full name, in the order of the model.
        bits: width of the codes of each of them.
        alpha: goal: fp16 bytes of the weights over their packed bytes. Methods of fixed width
            follow `bits` alone.
        norms: by name of a layer whose batch norm was folded, mean and standard deviation of its
            output channels as that norm had them, (channels,) float32 each.
        calibration: unlabelled inputs, None without.
        seed: of every random choice.
        device: where learning runs.
        progress: show progress bars.
        on_result: called with the result of each layer, block or epoch as soon as there is one.
        notes: what was done otherwise than the method's paper has it, one sentence each.
        relu: names of clipped activations that became plain ReLU.
    """

    model: nn.Module
    weights: dict[str, nn.Parameter]
    bits: dict[str, int]
    alpha: float
    norms: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    calibration: Sequence[Tensor] | Tensor | None = None
    seed: int = 0
    device: torch.device = torch.device("cpu")
    progress: bool = True
    on_result: OnResult = ignore
    notes: list[str] = field(default_factory=list)
    relu: list[str] = field(default_factory=list)


def per_weight(
    network: Network, encode: Callable[[Tensor, int], StoredWeight], description: str
) -> dict[str, StoredWeight]:
    """Encode each weight by itself.

    Args:
        network: its weights and bits.
        encode: called with a weight and its bits.
        description: of the progress bar.
    """
    bar = tqdm(
        network.weights.items(),
        desc=description,
        unit="layer",
        disable=not network.progress,
        leave=False,
    )
    return {name: encode(weight, network.bits[name]) for name, weight in bar}
