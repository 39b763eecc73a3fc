"""Sparse outliers on top of codebooks: a few weights are corrected one by one.

After REx (Yvinec et al., 2023) and SqueezeLLM (Kim et al., 2024), within a budget of bytes that
the positions count in.
"""

import torch
from torch import Tensor, nn

from jlcm.expanded import expand, largest_outliers
from jlcm.fold import norms_after_layers
from jlcm.layers import STORE, HalfTensor, affine_of, stored_tensors
from jlcm.packed import PackedWeight


def add_outliers(
    packed: nn.Module, reference: nn.Module, budget: int, importance: dict[str, Tensor]
) -> None:
    """Correct the weights with the largest weighted squared errors, over all layers, in place.

    A weight that a norm follows may have been learned together with the norm's scale; its error is
    that of their product.

    Args:
        packed: a compressed network.
        reference: its full-precision original, with the same order of neurons.
        budget: bytes of all outliers together.
        importance: by name, of each weight's squared error, same shape; missing tensors count by
            their squared error relative to the tensor.
    """
    store = dict(stored_tensors(packed))
    names = [name for name, held in store.items() if isinstance(held, PackedWeight)]
    unique = {id(store[name]): name for name in reversed(names)}  # the first name of each
    ratios = _norm_ratios(store, reference)
    originals = dict(reference.named_parameters())
    differences, gains = {}, []
    for name in unique.values():
        weight = originals[name].detach().float().cpu()
        ratio = ratios.get(name, torch.ones(len(weight))).view(-1, *[1] * (weight.dim() - 1))
        difference = (weight * ratio - store[name]().float().cpu()).half().float()
        differences[name] = difference
        cost = importance.get(name)
        cost = 1 / weight.square().sum().clamp(min=1e-30) if cost is None else cost.float().cpu()
        gains.append(torch.where(ratio != 0, difference / ratio, 0.0).square() * cost)
    replaced = {}
    chosen = largest_outliers(gains, budget)
    for (key, name), positions in zip(unique.items(), chosen, strict=True):
        if positions.numel():
            difference = differences[name].flatten()
            held = expand(store[name], positions=positions, differences=difference[positions])
            norm = (store[name]().float().cpu() + differences[name]).norm().clamp(min=1e-30)
            difference[positions] = 0
            held.relative_error = float(difference.norm() / norm)
            replaced[key] = held
    for name in names:
        if id(store[name]) in replaced:
            owner, _, tensor = name.rpartition(".")
            packed.get_submodule(owner)._modules[STORE][tensor] = replaced[id(store[name])]


def _norm_ratios(store: dict, reference: nn.Module) -> dict[str, Tensor]:
    """(rows,) by name of a weight: scale of the norm that follows, in the reference over here."""
    try:
        pairs = norms_after_layers(reference)
    except ValueError:  # not traceable: nothing was learned together with a norm
        return {}
    modules, ratios = dict(reference.named_modules()), {}
    for norm, layer in pairs.items():
        held = store.get(f"{norm}.weight")
        if isinstance(held, HalfTensor):
            here = held.values.float().cpu()
            there = affine_of(modules[norm])[0].cpu()
            ratios[f"{layer}.weight"] = torch.where(here != 0, there / here, 0.0)
    return ratios
