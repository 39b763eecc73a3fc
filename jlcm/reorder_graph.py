"""Permutation groups of convolutions and linear layers, from torch-pruning's dependency graph.

The graph (Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023) says which input and
output channels of which modules belong together. We follow one channel at a time through it: two
channels of a layer reveal the offset and stride with which all the others are laid out, and a walk
with a bounded number of steps cannot hang on reshapes that the graph misreads.
"""

import warnings
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch_pruning.pruner.function import BasePruningFunc

from jlcm.permutation import Member, PermutationGroup

_MAX_STEPS = 20_000  # of one walk; DenseNet-121 needs about 100
_KIND = torch_pruning.ops.OPTYPE
_PRODUCERS = (_KIND.CONV, _KIND.LINEAR)
_VECTOR_NORMS = (_KIND.BN, _KIND.IN, _KIND.LN, _KIND.GN, _KIND.PRELU)
_PASS_THROUGH = (
    _KIND.ELEMENTWISE,
    _KIND.RESHAPE,
    _KIND.CONCAT,
    _KIND.SPLIT,
    _KIND.UNBIND,
    _KIND.EXPAND,
    _KIND.SLICE,
)

# The index mappings of torch-pruning read these two fields.
_Index = namedtuple("_Index", ["idx", "root_idx"])


class Opaque(nn.Module):
    """Runs a module but shows the dependency graph a single operation that couples no channels."""

    def __init__(self, inner: nn.Module) -> None:
        """Wrap `inner`; `used` tells afterwards whether it ever ran."""
        super().__init__()
        self._hidden = (inner,)  # a tuple hides it from nn.Module
        self.used = False

    def __getattr__(self, name: str) -> Any:
        """Parents may read attributes of the module that was replaced."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_hidden"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the inner module returns, differentiable in its first tensor only."""
        self.used = True
        with torch.no_grad():
            output = self._hidden[0](*args, **kwargs)
        inputs = [
            value
            for value in (*args, *kwargs.values())
            if isinstance(value, Tensor) and value.requires_grad
        ]
        # Something to differentiate even where the module reads the network's input directly.
        inputs.append(torch.zeros((), requires_grad=True))
        if isinstance(output, tuple):
            return (_OpaqueFunction.apply(output[0], *inputs), *output[1:])
        return _OpaqueFunction.apply(output, *inputs)


class _OpaqueFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, *inputs: Tensor) -> Tensor:
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError("the graph is traced, never differentiated")


class _OpaquePruner(BasePruningFunc):
    """Tells torch-pruning that the inputs and outputs of `Opaque` are unrelated."""

    def prune_out_channels(self, layer: nn.Module, idxs: Any) -> nn.Module:
        return layer

    def prune_in_channels(self, layer: nn.Module, idxs: Any) -> nn.Module:
        return layer

    def get_out_channels(self, layer: nn.Module) -> None:
        return None

    def get_in_channels(self, layer: nn.Module) -> None:
        return None


def layer_groups(
    model: nn.Module, forward: Callable[[nn.Module], list[Tensor]]
) -> list[list[PermutationGroup]]:
    """Candidate groups of a model's convolutions and linear layers.

    Args:
        model: Model in evaluation mode with differentiable parameters. Modules to be left alone
            are wrapped in `Opaque`.
        forward: Runs the model and returns its differentiable outputs.

    Returns:
        One list for each producer: a single group, or one for each group of a grouped convolution.
    """
    graph = torch_pruning.DependencyGraph()
    graph.register_customized_layer(Opaque, _OpaquePruner())
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        graph.build_dependency(
            model,
            (),
            # The product is a node of its own: without it, an output that comes straight from a
            # layer would not be marked as one.
            forward_fn=lambda module, _: [output.mul(1) for output in forward(module)],
            verbose=False,
        )
    names = {
        id(tensor): name
        for tensors in (model.named_buffers(), model.named_parameters())
        for name, tensor in tensors
    }
    seen: set[nn.Module] = set()
    result = []
    for module, node in list(graph.module2node.items()):
        if node.type not in _PRODUCERS or module in seen:
            continue
        groups, producers = _groups_of(graph, node, names)
        seen |= producers
        if groups:
            result.append(groups)
    return result


def _groups_of(
    graph: Any, root: Any, names: dict[int, str]
) -> tuple[list[PermutationGroup], set[nn.Module]]:
    """Groups rooted at one layer, and the layers that need not be tried again."""
    channels = root.module.weight.shape[0]
    first = _walk(graph, root, 0)
    if first is None:
        return [], {root.module}
    producers = {node.module for node, is_output in first if is_output}
    # A layer whose output is split and gated by itself meets its own rows again, halfway.
    starts = sorted(first[root, True])
    size = starts[1] if len(starts) > 1 else channels
    if size < 2 or any(m.groups > 1 for m in producers - {root.module} if hasattr(m, "groups")):
        return [], producers
    last = _walk(graph, root, size - 1)
    if last is None or last.keys() != first.keys():
        return [], producers

    members: dict[tuple, Member] = {}
    rows: list[tuple[Tensor, Member]] = []
    for key, entries in first.items():
        node, is_output = key
        runs = _runs(sorted(entries))
        spread = {s + span * (size - 1) + k for s, span in runs for k in range(span)}
        if spread != last[key]:
            return [], producers
        slots = _slots(node, is_output)
        if slots is None:
            return [], producers
        for tensor, dim in slots:
            if id(tensor) not in names:  # a parametrised weight is recomputed at every call
                return [], producers
            for start, span in runs:
                member = Member(name=names[id(tensor)], dim=dim, start=start, span=span)
                members[id(tensor), dim, start] = member
                if is_output and tensor is node.module.weight:
                    rows.append((tensor, member))
    parts = getattr(root.module, "groups", 1)
    if parts > 1:  # only its own rows show where its groups begin
        rows = rows[:1]
    order = list(names)
    _, producer = max(rows, key=lambda row: (row[0].numel(), -order.index(id(row[0]))))
    return _split(producer, tuple(members.values()), size, parts), producers


def _split(
    producer: Member, members: tuple[Member, ...], size: int, parts: int
) -> list[PermutationGroup]:
    """One group, or for a grouped convolution one for each of its groups."""
    part = size // parts
    if part < 2:
        return []
    groups = []
    for offset in range(0, size, part):
        moved = tuple(
            Member(name=m.name, dim=m.dim, start=m.start + offset * m.span, span=m.span)
            for m in members
        )
        groups.append(
            PermutationGroup(
                producer=producer.name, start=producer.start + offset, size=part, members=moved
            )
        )
    return groups


def _runs(entries: list[int]) -> list[tuple[int, int]]:
    """Split sorted integers into (start, length) of consecutive ones."""
    runs: list[tuple[int, int]] = []
    for entry in entries:
        if runs and sum(runs[-1]) == entry:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((entry, 1))
    return runs


def _walk(graph: Any, root: Any, channel: int) -> dict[tuple[Any, bool], set[int]] | None:
    """Everything that one output channel of `root` is coupled with.

    Returns:
        The coupled entries for each (node, whether its outputs or its inputs), or None if the
        channel reaches something that must keep its place: the model's output, a module that was
        not analysed, a free parameter, or a sum of several layers' outputs.
    """
    handler = graph.get_pruner_of_module(root.module).prune_out_channels
    start = [_Index(channel, channel)]
    coupled: dict[tuple[Any, bool], set[int]] = {(root, True): {channel}}
    stack = [(root, handler, start)]
    producers, summed, steps = {root}, False, 0
    while stack:
        steps += 1
        node, handler, indices = stack.pop()
        for dependency in node.dependencies:
            if not dependency.is_triggered_by(handler):
                continue
            mapped = indices
            for mapping in dependency.index_mapping:
                mapped = mapped if mapping is None else mapping(mapped)
            target = dependency.target
            is_output = target.type in _PRODUCERS and graph.is_out_channel_pruning_fn(
                dependency.handler
            )
            known = coupled.setdefault((target, is_output), set())
            fresh = [index for index in mapped if index.idx not in known]
            if not fresh:
                continue
            known.update(index.idx for index in fresh)
            if is_output:
                producers.add(target)
            summed |= _is_sum(target)
            if not _movable(target) or (summed and len(producers) > 1) or steps > _MAX_STEPS:
                return None
            stack.append((target, dependency.handler, fresh))
    return {key: entries for key, entries in coupled.items() if entries}


def _is_sum(node: Any) -> bool:
    name = str(getattr(node.module, "_grad_fn", "")).lower()
    return name.startswith(("add", "sub")) and len(node.inputs) > 1


def _movable(node: Any) -> bool:
    """Whether a permutation of this node's channels can be undone elsewhere."""
    module = node.module
    match node.type:
        case _KIND.CONV | _KIND.LINEAR | _KIND.BN | _KIND.IN | _KIND.PRELU:
            return True
        case _KIND.DEPTHWISE_CONV:
            return module.in_channels == module.out_channels
        case _KIND.LN:
            return len(module.normalized_shape) == 1
        case _KIND.GN:
            return module.num_groups in (1, module.num_channels)
        case kind:
            return kind in _PASS_THROUGH


def _slots(node: Any, is_output: bool) -> list[tuple[Tensor, int]] | None:
    """Tensors and dimensions that hold a node's channels; None if they cannot be permuted."""
    module, kind = node.module, node.type
    if kind in _PASS_THROUGH:
        return []
    if kind in _PRODUCERS and not is_output:
        if getattr(module, "groups", 1) > 1:  # its columns are shared by groups of input channels
            return None
        return [(module.weight, 0 if getattr(module, "transposed", False) else 1)]
    if kind in _PRODUCERS and getattr(module, "transposed", False):
        return None  # its rows are input channels
    if kind == _KIND.PRELU and module.num_parameters == 1:
        return []
    names = ("weight", "bias", "running_mean", "running_var")
    tensors = (getattr(module, name, None) for name in names)
    return [(tensor, 0) for tensor in tensors if tensor is not None]
