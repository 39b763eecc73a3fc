"""Fold batch norms into the layers before them.

Uniform methods and DFQ need it. A shared codebook is usually better without: folding multiplies
every row by a factor of its own.
"""

from collections import Counter

import torch
from torch import fx, nn

from jlcm.layers import affine_of, is_static_norm
from jlcm.learning.products import multiplies_stored_weight


class _Tracer(fx.Tracer):
    """Keeps subclasses of batch norm (timm's carry an activation) and attention whole."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        leaves = (nn.Conv1d, nn.Conv2d, nn.Linear, nn.MultiheadAttention)
        return (
            is_static_norm(module)
            or isinstance(module, leaves)
            or super().is_leaf_module(module, name)
        )


def fold_batch_norms(model: nn.Module) -> set[str]:
    """Multiply each batch norm into the convolution or linear layer that alone feeds it, in place.

    The norm stays in its place and applies nothing any more, so the function is the same.

    Args:
        model: in evaluation mode.

    Returns:
        Names of the norms that were folded.

    Raises:
        ValueError: if the network cannot be traced by torch.fx.
    """
    modules, folded = dict(model.named_modules()), set()
    for norm, layer in norms_after_layers(model).items():
        _fold(modules[layer], modules[norm])
        folded.add(norm)
    return folded


def trace(model: nn.Module) -> fx.Graph:
    """Graph of a network in which layers, batch norms and attention are single nodes.

    Raises:
        ValueError: if the network cannot be traced by torch.fx.
    """
    try:
        return _Tracer().trace(model)
    except Exception as error:  # torch.fx raises many types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"fold_bn needs a network that torch.fx can trace, this one fails: {reason}"
        ) from error


def norms_after_layers(model: nn.Module) -> dict[str, str]:
    """Batch norms by name, each with the convolution or linear layer that alone feeds it.

    Layers that standardise their weight are left out: it cannot hold the norm's scale.

    Raises:
        ValueError: if the network cannot be traced by torch.fx.
    """
    graph = trace(model)
    modules, pairs = dict(model.named_modules()), {}
    owners = Counter(id(p) for m in modules.values() for p in m._parameters.values())
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    for node in graph.nodes:
        norm = modules.get(node.target) if node.op == "call_module" else None
        if norm is None or not is_static_norm(norm) or calls.count(node.target) > 1:
            continue
        producer = node.all_input_nodes[0] if node.all_input_nodes else node
        layer = modules.get(producer.target) if producer.op == "call_module" else None
        alone = len(producer.users) == 1 and calls.count(producer.target) == 1
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear) and alone and _own(layer, owners):
            same = len(layer.weight) == norm.num_features  # else it acts on another dimension
            if same and multiplies_stored_weight(layer):
                pairs[node.target] = producer.target
    return pairs


def _own(layer: nn.Module, owners: Counter) -> bool:
    """Whether weight and bias are plain parameters of this layer alone."""
    tensors = [layer._parameters.get("weight"), layer.bias]
    return tensors[0] is not None and all(owners[id(t)] == 1 for t in tensors if t is not None)


def _fold(layer: nn.Module, norm: nn.Module) -> None:
    scale, shift = affine_of(norm)
    with torch.no_grad():
        rows = scale.view(-1, *[1] * (layer.weight.dim() - 1))
        layer.weight.copy_(layer.weight * rows)  # in float32 if the weight has fewer bits
        bias = shift if layer.bias is None else shift + layer.bias.float() * scale
        layer.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=False)
        norm.running_mean.zero_()
        norm.running_var.fill_(1 - norm.eps)
        if norm.affine:
            norm.weight.fill_(1)
            norm.bias.zero_()
