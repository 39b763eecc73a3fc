"""Channel permutations that keep a network's function: what moves, and the move itself."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


class ReorderError(RuntimeError):
    """The model could not be analysed; callers may fall back to orders stored with each tensor."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """A slice of one tensor that moves with the order of a `PermutationGroup`.

    Channel c of the group owns the entries start + c * span, ..., start + (c + 1) * span - 1 of
    dimension `dim`.

    Attributes:
        name: Fully qualified state-dict name, for example ``"layer1.0.conv1.weight"``.
        dim: Dimension that is permuted.
        start: First entry along `dim` that belongs to the group.
        span: Consecutive entries per channel; more than 1 behind a flatten.
    """

    name: str
    dim: int
    start: int = 0
    span: int = 1


@dataclass(frozen=True, kw_only=True)
class PermutationGroup:
    """Slices that have to be permuted together for the network's function to stay the same.

    Attributes:
        producer: Name of the weight tensor whose rows (dimension 0) choose the order.
        start: First of these rows.
        size: Number of rows, and so the length of an order.
        members: Every slice to permute: the producer's rows, its bias, normalisation vectors,
            depthwise weights and the consumers' input columns.
    """

    producer: str
    start: int
    size: int
    members: tuple[Member, ...]


def tensor_by_name(model: nn.Module, name: str) -> Tensor:
    """Return the parameter or buffer with this fully qualified name (KeyError if there is none)."""
    path, _, leaf = name.rpartition(".")
    try:
        owner = model.get_submodule(path)
    except AttributeError as error:
        raise KeyError(f"the model has no module {path!r} (for tensor {name!r})") from error
    tensor = owner._parameters.get(leaf)
    if tensor is None:
        tensor = owner._buffers.get(leaf)
    if tensor is None:
        raise KeyError(f"the model has no parameter or buffer {name!r}")
    return tensor


def check_shapes(model: nn.Module, group: PermutationGroup) -> None:
    """Raise ValueError or KeyError if a member does not fit the tensor it names in `model`."""
    for member in group.members:
        shape = tensor_by_name(model, member.name).shape
        stop = member.start + member.span * group.size
        if not 0 <= member.dim < len(shape) or member.start < 0 or stop > shape[member.dim]:
            raise ValueError(
                f"{member.name} of shape {tuple(shape)} has no entries {member.start}..{stop} "
                f"along dimension {member.dim}, which the group of {group.producer} permutes"
            )


def permute(model: nn.Module, group: PermutationGroup, order: Tensor) -> None:
    """Re-order the channels of one group in place, on parameters and buffers.

    Args:
        model: The model the group was computed for (or one with the same tensors).
        group: One of the results of `permutation_groups`.
        order: (size,) int64; the new channel i is the old channel order[i].

    Raises:
        ValueError: If `order` is not a permutation of 0..size-1, or the shapes do not fit. The
            model is then untouched.
        KeyError: If the model lacks one of the tensors.
    """
    if order.dtype != torch.int64 or order.shape != (group.size,):
        raise ValueError(
            f"order must be int64 of shape ({group.size},) for the group of {group.producer}, "
            f"got {order.dtype} of shape {tuple(order.shape)}"
        )
    if not torch.equal(order.sort().values.cpu(), torch.arange(group.size)):
        raise ValueError(f"order is not a permutation of 0..{group.size - 1}")
    check_shapes(model, group)
    for member in group.members:
        permute_slice(tensor_by_name(model, member.name), member, order)


@torch.no_grad()
def permute_slice(tensor: Tensor, member: Member, order: Tensor) -> None:
    """Re-order in place the slice of `tensor` that `member` describes, as `permute` does."""
    part = tensor.narrow(member.dim, member.start, member.span * order.numel())
    channels = part.unflatten(member.dim, (order.numel(), member.span))
    channels.copy_(channels.index_select(member.dim, order.to(tensor.device)))
