"""DFQ: equal ranges for all channels and corrected biases, without data.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019.
Channels between two layers are rescaled so that one grid for the tensor suits them all. The mean
error that rounding leaves in each output is then taken off the bias; the means of the inputs follow
from the batch norms.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from jlcm.config import Invalid
from jlcm.layers import unclip
from jlcm.methods.chains import Chains, Pair
from jlcm.methods.grid import as_rows, min_max
from jlcm.methods.network import Network, per_weight
from jlcm.packed import StoredWeight

#: Equalisation ends when weights change by less on average, or after so many sweeps.
TOLERANCE, SWEEPS = 2e-7, 40
#: Factors of a channel in one sweep, and the largest bias that equalisation makes (for float16).
_FACTORS, _LARGEST_BIAS = (1e-8, 1e8), 2.0**15


@dataclass(frozen=True, kw_only=True)
class DFQ:
    """Options of DFQ.

    Attributes:
        equalise: rescale channels between pairs of layers.
        unclip: make ReLU6 between such layers ReLU, which rescaling needs (as the paper does); else
            they are no pair. EfficientNet-Lite0 does not survive it, even without rounding.
        absorb: move the part of an activation that is almost always positive into the bias of the
            layer that follows, between equalised layers.
        correct: take the expected error of each output off its bias.
        per_row: one grid for each output neuron, or (the paper's first choice) one for the tensor.
    """

    equalise: bool = True
    unclip: bool = False
    absorb: bool = True
    correct: bool = True
    per_row: bool = True

    def __post_init__(self) -> None:
        """Check the choices."""
        for name, value in vars(self).items():
            if not isinstance(value, bool):
                raise Invalid(f"{name}={value!r} must be true or false")


def dfq(network: Network, options: DFQ) -> dict[str, StoredWeight]:
    """Equalise, absorb, round to nearest and correct biases; changes `network.model` in place.

    ReLU6 becomes ReLU only between layers that are equalised, where rescaling needs it: elsewhere
    that would change the function for nothing. The names are added to `network.relu`.

    Args:
        network: with folded batch norms.
        options: which of the steps run.

    Returns:
        The stored weights by name.
    """
    try:
        chains = Chains(network.model, network.norms)
    except ValueError:
        network.notes.append("torch.fx cannot trace the network: weights are rounded to nearest")
        return _round(network, options)
    if options.equalise:
        pairs = chains.pairs()
        if not options.unclip and any(pair.clipped for pair in pairs):
            pairs = [pair for pair in pairs if not pair.clipped]
            network.notes.append("ReLU6 stays, so the layers around it are not equalised")
        network.relu += [name for pair in pairs for name in pair.clipped]
        unclip(network.model, network.relu)
        equalise(network.model, pairs, network.norms)
        if options.absorb:
            absorb(network.model, pairs, network.norms)
        _note_pairs(network, chains, pairs)
    if options.per_row:
        network.notes.append("DFQ has a grid for each row, in its paper one for the tensor")
    packed = _round(network, options)
    if options.correct:
        _correct(network, chains, packed)
    return packed


def equalise(model: nn.Module, pairs: list[Pair], norms: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Rescale channels until both layers of each pair have the same largest weights, in place.

    Row i of the first layer is multiplied, and column i of the second divided, by sqrt(r2 / r1) of
    their largest magnitudes r1 and r2. Activations between them must be positively homogeneous.

    Args:
        model: owner of the layers.
        pairs: of its layers.
        norms: mean and standard deviation of a layer's outputs by name, rescaled along.
    """
    layers = {
        name: model.get_submodule(name) for pair in pairs for name in (pair.first, pair.second)
    }
    # In float32 to the end, whatever the network's dtype.
    weights = {name: layer.weight.detach().float().clone() for name, layer in layers.items()}
    factors = {pair.first: torch.ones_like(weights[pair.first].flatten(1)[:, 0]) for pair in pairs}
    for _ in range(SWEEPS if pairs else 0):
        before = {name: weight.clone() for name, weight in weights.items()}
        for pair in pairs:
            _equalise(pair, layers, weights, factors)
        moved = sum(float((weights[name] - before[name]).abs().sum()) for name in weights)
        if moved <= TOLERANCE * sum(weight.numel() for weight in weights.values()):
            break
    with torch.no_grad():
        for name, weight in weights.items():
            layers[name].weight.copy_(weight)
        for name, factor in factors.items():
            if layers[name].bias is not None:
                layers[name].bias.copy_(layers[name].bias.float() * factor)
            if name in norms:
                mean, deviation = norms[name]
                norms[name] = mean * factor, deviation * factor


def absorb(model: nn.Module, pairs: list[Pair], norms: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Move c = max(0, mean - 3 deviations) from each first layer's outputs into the second's bias.

    ReLU(x - c) + c is ReLU(x) wherever x is at least c: for all but one input in 700 under the
    norm's statistics. As in the paper, the border that zero padding adds is not looked at.

    Args:
        model: owner of the layers.
        pairs: of its layers; those with another activation than ReLU are left alone.
        norms: mean and standard deviation of a layer's outputs by name, shifted along.
    """
    for pair in pairs:
        if not pair.rectified or pair.first not in norms:
            continue
        mean, deviation = norms[pair.first]
        shift = (mean - 3 * deviation).clamp(min=0)
        if shift.any():
            first, second = model.get_submodule(pair.first), model.get_submodule(pair.second)
            add_bias(first, -shift)
            add_bias(second, response(second, second.weight, shift))
            norms[pair.first] = mean - shift, deviation


def response(layer: nn.Module, weight: Tensor, values: Tensor) -> Tensor:
    """(rows,) float32 outputs of a layer for inputs that are constant in each channel.

    Args:
        layer: convolution or linear layer.
        weight: used in place of the layer's own, of the same shape.
        values: (channels,) of the inputs.
    """
    groups = getattr(layer, "groups", 1)
    kernel_sums = weight.detach().float().flatten(2).sum(2) if weight.dim() > 2 else weight.float()
    kernel_sums = kernel_sums.reshape(groups, -1, weight.shape[1])
    return (kernel_sums @ values.view(groups, -1, 1)).flatten().detach()


def add_bias(layer: nn.Module, shift: Tensor) -> None:
    """Add to a layer's bias, in place; it gets one if it has none.

    Args:
        layer: convolution or linear layer.
        shift: (rows,) float32.
    """
    if layer.bias is None:
        layer.bias = nn.Parameter(shift.to(layer.weight.dtype), requires_grad=False)
    else:
        with torch.no_grad():
            layer.bias.copy_(layer.bias.float() + shift)


def _equalise(
    pair: Pair,
    layers: dict[str, nn.Module],
    weights: dict[str, Tensor],
    factors: dict[str, Tensor],
) -> None:
    first, second = weights[pair.first], weights[pair.second]
    channel = 0 if getattr(layers[pair.second], "groups", 1) > 1 else 1  # depthwise: its rows
    ours = first.abs().flatten(1).amax(1)
    theirs = second.abs().transpose(0, channel).flatten(1).amax(1)
    alive = (ours > 0) & (theirs > 0)
    factor = torch.where(alive, (theirs / ours).sqrt().clamp(*_FACTORS), 1.0)
    if layers[pair.first].bias is not None:
        bias = (layers[pair.first].bias.detach().float() * factors[pair.first]).abs()
        factor = factor.minimum((_LARGEST_BIAS / bias).clamp(min=1))
    first *= factor.view(-1, *[1] * (first.dim() - 1))
    second /= factor.view(*[1] * channel, -1, *[1] * (second.dim() - 1 - channel))
    factors[pair.first] *= factor


def _round(network: Network, options: DFQ) -> dict[str, StoredWeight]:
    def encode(weight, bits):
        matrix = as_rows(weight)
        grid = min_max(matrix, bits, per_row=options.per_row)
        return grid.stored(grid.codes(matrix), tuple(weight.shape), weight.dtype)

    return per_weight(network, encode, "round")


def _correct(network: Network, chains: Chains, packed: dict[str, StoredWeight]) -> None:
    """Take the change of weights times the expected input off each layer's bias."""
    inputs, corrected = chains.inputs(), 0
    for name, weight in network.weights.items():
        layer_name, _, attribute = name.rpartition(".")
        if layer_name in inputs and attribute == "weight":
            layer = network.model.get_submodule(layer_name)
            change = packed[name]().to(weight.device).float() - weight.detach().float()
            add_bias(layer, -response(layer, change, inputs[layer_name]))
            corrected += 1
    if not corrected:
        network.notes.append(
            "no batch norm tells the mean of a layer's inputs: DFQ is equalisation where that is "
            "possible, and rounding to nearest"
        )
    elif corrected < len(network.weights):
        network.notes.append(
            f"{len(network.weights) - corrected} of {len(network.weights)} layers keep their bias, "
            "because no batch norm tells the mean of their inputs"
        )


def _note_pairs(network: Network, chains: Chains, pairs: list[Pair]) -> None:
    if not pairs:
        network.notes.append("no two layers follow each other so that they can be equalised")
    if chains.kept_clipped:
        network.notes.append(
            f"layers around {chains.kept_clipped} clipped activations are not equalised, because "
            "these are functions or modules used several times"
        )
    if network.relu and any(isinstance(m, nn.ReLU6) for m in network.model.modules()):
        network.notes.append("ReLU6 became ReLU between equalised layers alone")
