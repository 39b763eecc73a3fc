"""A packed network whose codebooks, scales and vectors receive gradients.

The copy keeps the packed network's modules and their forward; only what decodes a tensor is
replaced. A codeword's gradient is the sum over the weights that use it, a scale's the sum over its
group, exact and without a dense one-hot tensor.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from jlcm.clustering.scalar import assign
from jlcm.expanded import ExpandedWeight
from jlcm.layers import STORE, HalfTensor, Stored, stored_tensors
from jlcm.packed import PackedWeight, group_sizes
from jlcm.packing import pack
from jlcm.rotation import rotate, unrotate
from jlcm.trellis import index_of

#: Gradient steps of a zero vector (biases that start at 0) are taken in this unit.
LEAST_UNIT = 1e-2


#: A module that stands in for a stored tensor while it is trained. Calling it decodes with
#: gradients; `project`, `units` and `write` are as in the two classes below.
Trainable = nn.Module
#: Makes what stands in for a packed weight, from it and the original weight (None if that is
#: unknown). Weights for which it returns None are left as they are.
StandIn = Callable[[PackedWeight, Tensor | None], Trainable | None]


class TrainableWeight(nn.Module):
    """Stands in for a `PackedWeight`: decodes with gradients.

    Attributes:
        codebooks: (groups, codewords) float32 parameter, each row ascending unless the weight
            has memory.
        scales: (groups,) float32 parameter, or None.
        latent: (N,) float32 parameter in the unit of the codewords, or None where the codes are
            fixed. A weight's code is the codeword nearest to its latent value; the gradient of the
            codeword passes straight through to the latent value.
        codes: (N,) uint8, of the re-ordered rows.
    """

    def __init__(self, packed: PackedWeight, original: Tensor | None, *, codes: bool) -> None:
        """Start at the packed weight.

        Args:
            packed: the weight.
            original: the full-precision weight, or None. A latent value starts at the original
                weight if that is nearest to the weight's codeword, else at the codeword.
            codes: whether the codes are learned; those of a trellis are not.
        """
        super().__init__()
        self.shape, self.rows, self.dtype = packed.shape, packed.rows, packed.dtype
        self.bits, self.rotated = packed.bits, packed.rotated
        self.codebooks = nn.Parameter(packed.codebooks.float())
        has_scales = packed.scales is not None
        self.scales = nn.Parameter(packed.scales.float()) if has_scales else None
        self.latent = None
        self.memory = packed.memory
        self.register_buffer("codes", packed.unpack_codes())
        self.register_buffer("order", packed.row_order())
        group, books = packed.codebook_index(), packed.codebooks.shape[0]
        self.register_buffer("group", None if group is None else group.int())
        self.register_buffer(
            "book_sizes", None if group is None else group.bincount(minlength=books)
        )
        # Tiles interleave: their weights are brought together to be assigned.
        tiled = group is not None and packed.tile is not None
        self.register_buffer("by_group", group.argsort(stable=True) if tiled else None)
        sizes = group_sizes(packed.count, packed.scales.numel()) if has_scales else None
        self.register_buffer("scale_sizes", sizes)
        if codes and not self.memory:
            self.latent = nn.Parameter(self._initial_latent(packed, original))

    def forward(self) -> Tensor:
        """Decode: `shape` tensor of `dtype`."""
        index = index_of(self.codes.view(self.rows, -1), self.bits, self.memory).view(-1)
        if self.group is not None:
            index += self.group * self.codebooks.shape[1]
        values = _Decode.apply(self.codebooks, self.scales, self.latent, index, self.scale_sizes)
        values = values.view(self.rows, -1)
        if self.order is not None:
            values = torch.zeros_like(values).index_copy(0, self.order, values)
        if self.rotated:
            values = unrotate(values)
        return values.view(self.shape).to(self.dtype)

    @torch.no_grad()
    def project(self) -> None:
        """After a step: keep codebooks ascending, and move codes to the nearest codewords."""
        if not self.memory:
            self.codebooks.copy_(self.codebooks.cummax(1).values)
        if self.latent is not None:
            self.codes = self._nearest(self.latent, self.codebooks)

    def units(self) -> Iterator[tuple[str, nn.Parameter, float]]:
        """Each parameter with its kind and the unit that its learning rate is relative to."""
        # With memory a codeword serves fewer weights: its gradient is as much noisier.
        yield "codebooks", self.codebooks, _rms(self.codebooks) / 2 ** (self.memory / 2)
        if self.scales is not None:
            yield "scales", self.scales, _rms(self.scales)
        if self.latent is not None:
            books = self.codebooks.detach()
            gap = float((books[:, -1] - books[:, 0]).mean()) / max(books.shape[1] - 1, 1)
            yield "codes", self.latent, gap

    def write(self, packed: PackedWeight) -> None:
        """Round to float16 and store; shapes and bytes stay as they are."""
        packed.relative_error = float("nan")  # what was measured at the clustering
        packed.codebooks = _rounded(self.codebooks, packed.codebooks)
        if self.scales is not None:
            packed.scales = _rounded(self.scales, packed.scales)
        if self.latent is not None:
            packed.codes = pack(self.codes, self.bits)

    def _initial_latent(self, packed: PackedWeight, original: Tensor | None) -> Tensor:
        centre = packed.codeword_per_weight()
        if original is None or original.shape != self.shape:
            return centre
        values = original.detach().to(centre.device).float().reshape(self.rows, -1)
        values = rotate(values) if self.rotated else values
        values = (values if self.order is None else values[self.order]).reshape(-1)
        scales = packed.scale_per_weight()
        if scales is not None:
            values = torch.where(scales > 0, values / scales, centre)
        same = self._nearest(values, self.codebooks) == self.codes
        return torch.where(same, values, centre)

    def _nearest(self, values: Tensor, codebooks: Tensor) -> Tensor:
        codebooks, values = codebooks.detach(), values.detach()
        if self.by_group is None:
            return assign(values, codebooks, sizes=self.book_sizes)
        codes = assign(values[self.by_group], codebooks, sizes=self.book_sizes)
        return torch.empty_like(codes).index_copy_(0, self.by_group, codes)


class TrainableTensor(nn.Module):
    """Stands in for a `HalfTensor` (biases, norms).

    Attributes:
        values: float32 parameter.
    """

    def __init__(self, half: HalfTensor) -> None:
        """Start at the stored values."""
        super().__init__()
        self.dtype = half.dtype
        self.values = nn.Parameter(half.values.float())

    def forward(self) -> Tensor:
        """The tensor in the computing dtype."""
        return self.values.to(self.dtype)

    def project(self) -> None:
        """Nothing restricts the values."""

    def units(self) -> Iterator[tuple[str, nn.Parameter, float]]:
        """The parameter with its kind and the unit that its learning rate is relative to."""
        yield "vectors", self.values, max(_rms(self.values), LEAST_UNIT)

    def write(self, half: HalfTensor) -> None:
        """Round to the stored 16-bit dtype."""
        half.values = _rounded(self.values, half.values)


def trainable_copy(
    packed: nn.Module, reference: nn.Module, *, codes: bool, stand_in: StandIn | None = None
) -> tuple[nn.Module, dict[str, tuple[Trainable, PackedWeight | HalfTensor]]]:
    """Copy a packed network with everything trainable that costs no bytes to change.

    Args:
        packed: a compressed network; it is left as it is.
        reference: the original network, whose weights the latent values start at.
        codes: whether codes are learned as well.
        stand_in: makes what stands in for packed weights, None for `TrainableWeight`.

    Returns:
        The copy, in evaluation mode, and by name each trainable tensor with the stored tensor that
        it was made from and is written to. Tensors that modules share come once.
    """
    twin = copy.deepcopy(packed).eval().requires_grad_(False)
    return twin, attach_trainables(twin, packed, reference, codes=codes, stand_in=stand_in)


def attach_trainables(
    twin: nn.Module,
    packed: nn.Module,
    reference: nn.Module,
    *,
    codes: bool,
    names: set[str] | None = None,
    stand_in: StandIn | None = None,
) -> dict[str, tuple[Trainable, PackedWeight | HalfTensor]]:
    """Put trainable tensors, made from the packed network's, into its copy.

    Args:
        twin: the copy.
        packed: a compressed network; it is left as it is.
        reference: the original network.
        codes: whether codes are learned as well.
        names: of the tensors, None for all.
        stand_in: makes what stands in for packed weights, None for `TrainableWeight`.

    Returns:
        By name each trainable tensor with the stored tensor that it was made from.
    """
    originals = dict(reference.named_parameters())
    stand_in = stand_in or partial(TrainableWeight, codes=codes)
    made: dict[int, Trainable | None] = {}
    trainables: dict[str, tuple[Trainable, PackedWeight | HalfTensor]] = {}
    for name, whole in stored_tensors(packed):
        # Of a sum, codebooks and scales of its base are trained; the rest is added as it is.
        stored = whole.base if isinstance(whole, ExpandedWeight) else whole
        if not _is_trainable(stored) or not (names is None or name in names):
            continue
        if id(stored) not in made:
            if isinstance(stored, PackedWeight):
                made[id(stored)] = stand_in(stored, originals.get(name))
            else:
                made[id(stored)] = TrainableTensor(stored)
            if made[id(stored)] is not None:
                trainables[name] = made[id(stored)], stored
        if made[id(stored)] is not None:
            module, _, tensor = name.rpartition(".")
            store = twin.get_submodule(module)._modules[STORE]
            if stored is whole:
                store[tensor] = made[id(stored)]
            else:
                store[tensor].base = made[id(stored)]
    return trainables


def optimizer_of(
    trainables: Iterable[Trainable], *, lr: float, lr_vectors: float, lr_codes: float
) -> torch.optim.Optimizer:
    """Adam over all parameters.

    Args:
        trainables: what is trained.
        lr: peak learning rate of codebooks and scales, relative to the unit of each tensor.
        lr_vectors: of biases and norms.
        lr_codes: of latent values.
    """
    rates = {"codebooks": lr, "scales": lr, "vectors": lr_vectors, "codes": lr_codes}
    groups = [
        {"params": [parameter], "kind": kind, "peak": rates[kind] * unit}
        for trainable in trainables
        for kind, parameter, unit in trainable.units()
    ]
    # A few hundred steps are too few for the usual second moment over a thousand.
    return torch.optim.Adam(groups, lr=0.0, betas=(0.9, 0.99))


def set_rates(optimizer: torch.optim.Optimizer, done: float, codes_start: float = 0.0) -> None:
    """Cosine decay from the peak; codes from their start on.

    Args:
        optimizer: of `optimizer_of`.
        done: share of the training that is done.
        codes_start: share of it during which the codes stay.
    """
    for group in optimizer.param_groups:
        share = done
        if group["kind"] == "codes":
            share = (done - codes_start) / (1 - codes_start) if done > codes_start else 1.0
        group["lr"] = group["peak"] * 0.5 * (1 + math.cos(math.pi * share))


class _Decode(torch.autograd.Function):
    """(N,) decoded weights; gradients pass straight through to the latent values."""

    @staticmethod
    def forward(ctx, codebooks, scales, latent, index, sizes):  # noqa: D102
        values = codebooks.reshape(-1).index_select(0, index)
        per_weight = None if scales is None else scales.repeat_interleave(sizes)
        ctx.save_for_backward(index, sizes, per_weight, None if scales is None else values)
        ctx.books = codebooks.shape
        return values if scales is None else values * per_weight

    @staticmethod
    def backward(ctx, gradient):  # noqa: D102
        index, sizes, per_weight, values = ctx.saved_tensors
        of_scales = None
        if per_weight is not None:
            of_scales = torch.segment_reduce(gradient * values, "sum", lengths=sizes)
            gradient = gradient * per_weight
        of_books = index.bincount(weights=gradient, minlength=ctx.books.numel())
        of_latent = gradient if ctx.needs_input_grad[2] else None
        return of_books.view(ctx.books).to(gradient.dtype), of_scales, of_latent, None, None


def _is_trainable(stored: Stored) -> bool:
    if isinstance(stored, HalfTensor):
        return stored.values.is_floating_point()
    return isinstance(stored, PackedWeight)


def _rms(values: Tensor) -> float:
    return float(values.detach().float().square().mean().sqrt()) if values.numel() else 0.0


def _rounded(values: Tensor, like: Tensor) -> Tensor:
    """Round to a 16-bit dtype, at the largest value it holds where it would overflow."""
    most = torch.finfo(like.dtype).max
    return values.detach().clamp(-most, most).to(like.dtype)
