"""A layer together with what follows it: bias, or norm scale and shift.

These vectors are stored anyway. Re-estimating them on the calibration inputs costs no bytes, and a
norm's scale can hold a factor for each row of the weight before it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from jlcm.layers import HalfTensor, Stored, affine_of
from jlcm.learning.calibration import Layer
from jlcm.learning.factors import Factors, pack_factors
from jlcm.learning.objective import Moments
from jlcm.learning.options import Learn
from jlcm.packed import PackedWeight
from jlcm.rotation import rotate

#: Vectors stay within float16.
_LIMIT = 60000


@dataclass(frozen=True)
class Affine:
    """What follows the product W x of a layer: scale * (W x) + shift, (groups, rows) float64."""

    scale: Tensor
    shift: Tensor


@dataclass
class Target:
    """A packed weight, what follows it, and the same in the reference.

    Attributes:
        weight: packed.
        original: (groups, rows, n) float32, the reference's weight, a folded norm included, in the
            basis that the packed weight is encoded in.
        folded: what a folded norm does to the reference layer's output, None without one.
        scale: of the norm that follows, None without one.
        shift: of the norm, or the bias of a layer without a norm; None without either.
        bias: (groups, rows) of the layer where a norm has the shift, else zeros.
        reference: what is applied to the reference layer's output, after a folded norm.
        activation: what follows that, or None.
    """

    weight: PackedWeight
    original: Tensor
    folded: Affine | None
    scale: HalfTensor | None
    shift: HalfTensor | None
    bias: Tensor
    reference: Affine
    activation: Callable[[Tensor], Tensor] | None


def output_error(moments: Moments, weight: Tensor, affine: Affine, reference: Affine) -> float:
    """Squared error of scale * (W~ X~) + shift over the variance of the reference's output."""
    weight, count = weight.double(), moments.count
    mean, goal = moments.inputs / count, moments.outputs / count
    energy = ((weight @ moments.gram) * weight).sum(-1) / count
    product = (weight * moments.cross).sum(-1) / count
    offset = affine.shift - reference.shift
    means = affine.scale * (weight @ mean[..., None])[..., 0] - reference.scale * goal
    squared = affine.scale.square() * energy - 2 * affine.scale * reference.scale * product
    squared = squared + reference.scale.square() * moments.energy / count
    squared = squared + offset.square() + 2 * offset * means
    variance = reference.scale.square() * (moments.energy / count - goal.square())
    return float(squared.sum() / variance.sum().clamp(min=1e-30))


def refit(train: Moments, factors: Factors, target: Target, options: Learn) -> Affine:
    """Scale and shift after the layer, row scales absorbed, rounded as they will be stored."""
    given, reference = given_affine(target), target.reference
    weight = replace(factors, row_scale=None).weight().double()
    count = train.count
    mean, goal = train.inputs / count, train.outputs / count
    response = (weight @ mean[..., None])[..., 0]
    scale = given.scale
    if target.scale is not None:
        if factors.row_scale is not None:
            scale = reference.scale * factors.row_scale
        variance = ((weight @ train.gram) * weight).sum(-1) / count - response.square()
        goal_variance = train.energy / count - goal.square()
        covariance = (weight * train.cross).sum(-1) / count - response * goal
        if options.statistics == "moments":
            ratio = (goal_variance.clamp(min=0) / variance).sqrt() * covariance.sign()
        elif options.statistics == "regression":
            ratio = covariance / variance
        else:
            ratio = scale / reference.scale
        fitted = reference.scale * ratio
        usable = (variance > 1e-12) & fitted.isfinite() & (fitted.abs() < _LIMIT)
        scale = torch.where(usable, fitted, scale).half().double()
    own = given.shift - given.scale * target.bias
    if target.shift is not None and options.statistics != "none":
        fitted = reference.shift + reference.scale * goal - scale * (response + target.bias)
        own = torch.where(fitted.abs() < _LIMIT, fitted, own).half().double()
    return Affine(scale, own + scale * target.bias)


def given_affine(target: Target) -> Affine:
    """What follows the layer in the compressed network as it is."""
    shape = target.original.shape[:2]
    scale, shift = (
        target.bias * 0 + fill if held is None else held.values.double().view(shape)
        for held, fill in ((target.scale, 1.0), (target.shift, 0.0))
    )
    return Affine(scale, shift + scale * target.bias)


def target_of(
    layer: Layer, store: dict[str, Stored], modules: dict[str, nn.Module], device: torch.device
) -> Target:
    """Find what belongs to a layer.

    Args:
        layer: a packed weight.
        store: stored tensors of the compressed network by name.
        modules: of the reference, by name.
        device: of the computation.
    """
    owner, _, tensor = layer.name.rpartition(".")
    packed, module = store[layer.name], modules[owner]
    original = getattr(module, tensor).detach().float().to(device)
    groups = getattr(module, "groups", 1)
    original = original.reshape(groups, original.shape[0] // groups, -1)
    shape = original.shape[:2]
    ones = torch.ones(shape, dtype=torch.float64, device=device)
    bias = store.get(layer.name.removesuffix("weight") + "bias")
    scale, shift, own, folded = None, bias, 0 * ones, None
    reference = Affine(ones, 0 * ones)
    if layer.norm is not None:
        pair = affine_of(modules[layer.norm])
        affine = Affine(*(vector.double().view(shape).to(device) for vector in pair))
        if layer.folded:
            folded, original = affine, original * affine.scale.float()[..., None]
        else:
            scale, shift = store[f"{layer.norm}.weight"], store[f"{layer.norm}.bias"]
            own = own if bias is None else bias().double().view(shape)
            reference = affine
    if packed.rotated:
        original = rotate(original)
    return Target(packed, original, folded, scale, shift, own, reference, layer.activation)


def write(target: Target, factors: Factors, affine: Affine) -> None:
    """Put learned values in the place of the stored ones; shapes and dtypes stay."""
    packed = target.weight
    for name, value in pack_factors(packed, factors).items():
        getattr(packed, name).copy_(value)
    # The norm's scale may hold part of the weight, so the error is that of their product.
    reference = target.reference.scale
    ratio = torch.where(reference != 0, affine.scale / reference, 1.0).float()
    difference = factors.weight() * ratio[..., None] - target.original
    packed.relative_error = float(difference.norm() / target.original.norm().clamp(min=1e-30))
    shift = affine.shift - affine.scale * target.bias
    for held, value in ((target.scale, affine.scale), (target.shift, shift)):
        if held is not None:
            held.values.copy_(value.reshape(-1))


def stored_parts(target: Target) -> dict[str, Tensor]:
    """The stored tensors that a layer may change, themselves."""
    packed = target.weight
    parts = {"codes": packed.codes, "codebooks": packed.codebooks, "scales": packed.scales}
    parts |= {
        name: held.values
        for name, held in (("scale", target.scale), ("shift", target.shift))
        if held is not None
    }
    return {name: tensor for name, tensor in parts.items() if tensor is not None}
