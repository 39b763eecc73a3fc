"""Which neurons of a network may be re-ordered for free.

Re-ordering the rows of a weight tensor leaves the network's function unchanged if the consumers'
input columns are re-ordered alike. This is possible inside residual branches, for the hidden units
of an MLP and for the values inside an attention head. Networks' inputs, outputs and skip
connections tie several tensors together and keep their place.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from jlcm.permutation import (
    Member,
    PermutationGroup,
    ReorderError,
    check_shapes,
    permute,
    tensor_by_name,
)
from jlcm.reorder_attention import attention_modules, head_groups
from jlcm.reorder_graph import Opaque, layer_groups

__all__ = ["Member", "PermutationGroup", "ReorderError", "permutation_groups", "permute"]

# Right groups change the output by 1e-15 in float64 (1e-6 where a model computes in float32), wrong
# ones of a randomised network by 1e-2 or more.
_TOLERANCE = 1e-4
_FLOAT64_LIMIT = 200_000_000  # parameters; larger models are checked in float32 to save memory


def permutation_groups(model: nn.Module, example_inputs: Any) -> list[PermutationGroup]:
    """Find the sets of channels that can be permuted without changing the network's function.

    Convolutions and linear layers are found with torch-pruning's dependency graph, the values of
    attention heads by rules on the projections' names. Every group is then checked numerically: on
    a copy of the model with random weights, all groups are permuted at random and those that change
    the output are dropped. The model itself is not modified; the copy takes 8 bytes per parameter
    (4 above 200 million parameters). For very large networks, pass one block at a time.

    Args:
        model: Any network; it is analysed as in evaluation mode, on the CPU.
        example_inputs: One input of batch size 1: a tensor, a sequence of positional arguments or a
            mapping of keyword arguments.

    Returns:
        Groups that share no rows or columns, so that any subset may be permuted in any order;
        sorted by the position of the producer in the model. Producers that are multiplied (gated
        MLPs, squeeze-and-excitation) form one group, named after the largest. Producers that are
        summed, the network's outputs, and channels consumed by grouped convolutions are left out.

    Raises:
        ReorderError: If the network cannot be copied, traced or checked. Orders that are stored
            beside each tensor are then the way out.
    """
    try:
        twin = copy.deepcopy(model).to("cpu", torch.float32).eval()
        for parameter in twin.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        for module in twin.modules():  # hooks may act on the outside world
            module._forward_hooks.clear()
        units = _candidates(twin, example_inputs)
        units = _disjoint(twin, units)
        groups = _self_check(twin, example_inputs, units)
    except ReorderError:
        raise
    except Exception as error:  # whatever the model, torch-pruning or autograd may raise
        raise ReorderError(
            f"cannot analyse {type(model).__name__}: {type(error).__name__}: {error}"
        ) from error
    position = {name: i for i, (name, _) in enumerate(model.named_parameters())}
    return sorted(groups, key=lambda group: (position.get(group.producer, 0), group.start))


def _candidates(model: nn.Module, inputs: Any) -> list[list[PermutationGroup]]:
    """Candidate groups, in lists that stand or fall together."""
    names = attention_modules(model)
    with contextlib.ExitStack() as stack:
        wrapped = {name: stack.enter_context(_opaque(model, name)) for name in names if name}
        if "" in names:  # the model is an attention module itself
            units = []
        else:
            units = layer_groups(model, lambda module: _forward(module, inputs))
    used = [name for name in names if not name or wrapped[name].used]
    return units + [groups for name in used if (groups := head_groups(model, name))]


@contextlib.contextmanager
def _opaque(model: nn.Module, name: str) -> Iterator[Opaque]:
    """Wrap one submodule while the graph is built."""
    path, _, leaf = name.rpartition(".")
    parent = model.get_submodule(path)
    inner = parent._modules[leaf]
    wrapper = Opaque(inner)
    parent._modules[leaf] = wrapper
    try:
        yield wrapper
    finally:
        parent._modules[leaf] = inner


def _forward(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Run the model and return its floating-point output tensors."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    inputs = _map_tensors(
        inputs,
        lambda tensor: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None),
    )
    match inputs:
        case Tensor():
            output = model(inputs)
        case Mapping():
            output = model(**inputs)
        case _:
            output = model(*inputs)
    tensors: list[Tensor] = []
    _map_tensors(output, tensors.append)
    tensors = [tensor for tensor in tensors if tensor.is_floating_point()]
    if torch.is_grad_enabled():
        tensors = [tensor for tensor in tensors if tensor.requires_grad]
    if not tensors:
        raise ReorderError(f"{type(model).__name__} returns no tensor that depends on its weights")
    return tensors


def _map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    match value:
        case Tensor():
            return function(value)
        case Mapping():
            return {key: _map_tensors(item, function) for key, item in value.items()}
        case list() | tuple():
            items = [_map_tensors(item, function) for item in value]
            return tuple(items) if isinstance(value, tuple) else items
        case _:
            return value


def _disjoint(
    model: nn.Module, units: Sequence[list[PermutationGroup]]
) -> list[list[PermutationGroup]]:
    """Drop units that do not fit the tensors or move a slice that an earlier unit moves."""
    taken: dict[tuple[int, int], list[tuple[int, int]]] = {}
    kept = []
    for unit in units:
        try:
            for group in unit:
                check_shapes(model, group)
        except (KeyError, ValueError):
            continue
        slices = [
            ((id(tensor_by_name(model, m.name)), m.dim), (m.start, m.start + m.span * group.size))
            for group in unit
            for m in group.members
        ]
        # Names of one shared tensor count as one, hence id().
        free = all(
            stop <= other_start or other_stop <= start
            for key, (start, stop) in slices
            for other_start, other_stop in taken.get(key, ())
        )
        if free:
            kept.append(unit)
            for key, interval in slices:
                taken.setdefault(key, []).append(interval)
    return kept


def _self_check(
    model: nn.Module, inputs: Any, units: list[list[PermutationGroup]]
) -> list[PermutationGroup]:
    """Return the groups that leave the output of a randomised network unchanged.

    Destroys the weights of `model`. The groups are tried all at once, and halved where that fails.
    """
    if not units:
        return []
    count = sum(parameter.numel() for parameter in model.parameters())
    generator = torch.Generator().manual_seed(0)
    _randomise(model, generator)
    with torch.no_grad():
        try:
            model.to(torch.float64 if count <= _FLOAT64_LIMIT else torch.float32)
            reference = _forward(model, inputs)
        except RuntimeError:  # not every operation and model supports float64
            model.to(torch.float32)
            reference = _forward(model, inputs)
        if not all(output.isfinite().all() for output in reference):
            raise ReorderError(f"{type(model).__name__} gives no finite output for random weights")

        def unchanged(part: list[list[PermutationGroup]]) -> bool:
            groups = [group for unit in part for group in unit]
            orders = [_shuffle(group.size, generator) for group in groups]
            for group, order in zip(groups, orders, strict=True):
                permute(model, group, order)
            outputs = _forward(model, inputs)
            same = all(
                (output - expected).norm() <= _TOLERANCE * expected.norm()
                for output, expected in zip(outputs, reference, strict=True)
            )
            if not same:
                for group, order in zip(groups, orders, strict=True):
                    permute(model, group, order.argsort())
            return same

        def search(part: list[list[PermutationGroup]]) -> list[list[PermutationGroup]]:
            if unchanged(part):
                return part
            half = len(part) // 2
            return search(part[:half]) + search(part[half:]) if half else []

        kept = search(units)
        if len(kept) < len(units) and not unchanged(kept):
            raise ReorderError(f"the output of {type(model).__name__} is not reproducible")
    return [group for unit in kept for group in unit]


def _shuffle(size: int, generator: torch.Generator) -> Tensor:
    order = torch.randperm(size, generator=generator)
    return order.flip(0) if torch.equal(order, torch.arange(size)) else order


def _randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Draw weights for which every channel matters.

    Zero-initialised scales and near-zero statistics, common in trained networks too, would hide a
    wrong permutation.
    """

    def draw(tensor: Tensor, low: float | None = None, scale: float = 1.0) -> None:
        if low is None:
            values = torch.randn(tensor.shape, generator=generator) * scale
        else:
            values = torch.rand(tensor.shape, generator=generator) + low
        tensor.copy_(values)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point() or parameter.numel() <= 1:
                continue
            if parameter.ndim > 1:
                fan_in = parameter.numel() // parameter.shape[0]
                draw(parameter, scale=(2 / fan_in) ** 0.5)
            elif name.endswith("bias"):
                draw(parameter, scale=0.1)
            else:
                draw(parameter, low=0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                draw(buffer, scale=0.1)
            elif name.endswith("running_var"):
                draw(buffer, low=0.5)
