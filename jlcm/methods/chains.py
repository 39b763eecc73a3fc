"""What lies between the layers of a traced network: for equalisation and for expected inputs."""

import math
import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from jlcm.fold import trace
from jlcm.layers import is_static_norm

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")


class Step(Enum):
    """Operations that treat every channel by itself."""

    SAME = auto()
    AVERAGE = auto()
    LARGEST = auto()
    FLATTEN = auto()
    RELU = auto()
    LEAKY = auto()
    CLIPPED = auto()


_MODULES: dict[Any, Step] = {
    nn.Identity: Step.SAME,
    nn.modules.dropout._DropoutNd: Step.SAME,
    nn.modules.pooling._AvgPoolNd: Step.AVERAGE,
    nn.modules.pooling._AdaptiveAvgPoolNd: Step.AVERAGE,
    nn.modules.pooling._MaxPoolNd: Step.LARGEST,
    nn.modules.pooling._AdaptiveMaxPoolNd: Step.LARGEST,
    nn.ReLU: Step.RELU,
    nn.LeakyReLU: Step.LEAKY,
    nn.ReLU6: Step.CLIPPED,
}
#: Functions by themselves, methods by their name.
_CALLS: dict[Any, Step] = {
    functional.dropout: Step.SAME,
    functional.avg_pool2d: Step.AVERAGE,
    functional.adaptive_avg_pool2d: Step.AVERAGE,
    functional.max_pool2d: Step.LARGEST,
    functional.relu: Step.RELU,
    torch.relu: Step.RELU,
    "relu": Step.RELU,
    "relu_": Step.RELU,
    functional.leaky_relu: Step.LEAKY,
    functional.relu6: Step.CLIPPED,
}


@dataclass(frozen=True)
class Pair:
    """Two layers between which channels can be rescaled, once clipped activations are ReLU.

    Attributes:
        first: name of the layer whose rows are the channels.
        second: name of the layer whose columns are (of a depthwise convolution, the rows).
        clipped: names of the ReLU6 modules between them.
        rectified: whether all activations between them are ReLU, and there is one.
    """

    first: str
    second: str
    clipped: tuple[str, ...]
    rectified: bool


@dataclass(frozen=True)
class Signal:
    """What is known of the values at a point of the network.

    Attributes:
        mean: (channels,) float32.
        deviation: (channels,) float32 where each channel is normally distributed, else None.
        flat: whether channels are the last dimension, else the one after the batch.
    """

    mean: Tensor
    deviation: Tensor | None
    flat: bool


class Chains:
    """The layers of a network and what lies between them.

    Attributes:
        model: the network.
        norms: mean and standard deviation of the outputs of layers whose batch norms are folded.
        kept_clipped: how many clipped activations keep two layers from being a pair, because they
            are no modules of their own.
    """

    def __init__(self, model: nn.Module, norms: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Trace the network; `norms` may change afterwards.

        Raises:
            ValueError: if torch.fx cannot trace it.
        """
        self.model, self.norms, self.kept_clipped = model, norms, 0
        self.nodes = list(trace(model).nodes)
        self._calls = Counter(n.target for n in self.nodes if n.op == "call_module")
        named = model.named_modules(remove_duplicate=False)
        self._names = Counter(id(module) for _, module in named)
        parameters = (p for m in model.modules() for p in m._parameters.values())
        self._owners = Counter(id(parameter) for parameter in parameters)
        # Layers whose tensors the network reads beside calling them.
        self._read = {n.target.rpartition(".")[0] for n in self.nodes if n.op == "get_attr"}

    def layer(self, node: fx.Node) -> nn.Module | None:
        """The layer that a node calls, if it can be changed: called once, with its own tensors."""
        module = self._module(node)
        # Others may compute something else of their weight, as weight standardisation does.
        plain = type(module) in _LAYERS or type(module).__name__ == "Conv2dSame"
        if not plain or self._calls[node.target] > 1 or node.target in self._read:
            return None
        if module._parameters.get("weight") is None:
            return None
        tensors = (module.weight, module.bias)
        # A bias that was made since then belongs to nobody else.
        return module if all(t is None or self._owners[id(t)] <= 1 for t in tensors) else None

    def pairs(self) -> list[Pair]:
        """Pairs of layers, in the order of the network; the first feeds the second alone."""
        self.kept_clipped = 0
        found = [self._pair(node) for node in self.nodes if self.layer(node) is not None]
        return [pair for pair in found if pair is not None]

    def inputs(self) -> dict[str, Tensor]:
        """Expected inputs of layers, as far as they are known: (channels,) float32 by name.

        They follow from the statistics of batch norms, through activations, averages and sums. As
        in the paper, the border that zero padding adds is left out of account.
        """
        signals: dict[fx.Node, Signal | None] = {}
        expected = {}
        for node in self.nodes:
            layer = self.layer(node)
            signal = signals.get(node.all_input_nodes[0]) if node.all_input_nodes else None
            if layer is not None and signal is not None and _fits(layer, signal.flat, signal.mean):
                expected[node.target] = signal.mean
            signals[node] = self._signal(node, signals)
        return expected

    def _module(self, node: fx.Node) -> nn.Module | None:
        # Looked up anew, because activations are replaced.
        return self.model.get_submodule(node.target) if node.op == "call_module" else None

    def _has_norm(self, node: fx.Node) -> bool:
        return node.op == "call_module" and node.target in self.norms

    def _pair(self, node: fx.Node) -> Pair | None:
        second, source, between = self.layer(node), node.all_input_nodes[0], []
        while self.layer(source) is None:
            if self._steps(source) is None or len(source.users) > 1:
                return None
            between.insert(0, source)
            source = source.all_input_nodes[0]
        first = self.layer(source)
        steps = [step for passed in between for step in self._steps(passed)]
        flat = _flat(isinstance(first, nn.Linear), steps)
        if len(source.users) > 1 or flat is None or not _fits(second, flat, first.weight):
            return None
        if not (_simple(first) and _simple(second)):
            return None
        clipped = [n for n in between if Step.CLIPPED in self._steps(n)]
        names = [self._clipped_module(n) for n in clipped]
        if None in names:
            self.kept_clipped += names.count(None)
            return None
        active = {Step.CLIPPED: Step.RELU}
        kinds = {active.get(s, s) for s in steps} & {Step.RELU, Step.LEAKY}
        return Pair(source.target, node.target, tuple(names), kinds == {Step.RELU})

    def _clipped_module(self, node: fx.Node) -> str | None:
        module = self._module(node)
        if module is None or self._calls[node.target] > 1:
            return None
        name = f"{node.target}.act" if is_static_norm(module) else node.target
        return name if self._names[id(self.model.get_submodule(name))] == 1 else None

    def _steps(self, node: fx.Node) -> tuple[Step, ...] | None:
        """What a node does to each channel of its single input; None for anything else."""
        if len(node.all_input_nodes) != 1:
            return None
        module = self._module(node)
        if module is None:
            return _steps_of_call(node)
        if is_static_norm(module):  # timm's carry an activation
            folded = self._has_norm(node.all_input_nodes[0])
            return _steps_of_module(getattr(module, "act", nn.Identity())) if folded else None
        return _steps_of_module(module)

    def _signal(self, node: fx.Node, signals: dict[fx.Node, Signal | None]) -> Signal | None:
        module = self._module(node)
        if self._has_norm(node):
            return Signal(*self.norms[node.target], isinstance(module, nn.Linear))
        inputs = [signals.get(n) for n in node.all_input_nodes]
        sums = module is None and node.target in _SUMS and not node.kwargs
        if sums and len(inputs) == 2 and None not in inputs:
            one, other = inputs
            same = one.flat == other.flat and one.mean.shape == other.mean.shape
            return Signal(one.mean + other.mean, None, one.flat) if same else None
        if isinstance(module, nn.BatchNorm2d) and is_static_norm(module) and module.affine:
            if not self._has_norm(node.all_input_nodes[0]):  # not folded: it normalises here
                mean, deviation = module.bias.detach().float(), module.weight.detach().float()
                signal = Signal(mean, deviation.abs(), False)
                return _after(_steps_of_module(getattr(module, "act", nn.Identity())), signal)
        return _after(self._steps(node), inputs[0]) if len(inputs) == 1 else None


def rectified_mean(mean: Tensor, deviation: Tensor) -> Tensor:
    """E[ReLU(x)] of normally distributed x, from its mean and standard deviation."""
    deviation = deviation.clamp(min=torch.finfo(deviation.dtype).tiny)
    place = mean / deviation
    density = torch.exp(-place.square() / 2) / math.sqrt(2 * math.pi)
    return deviation * density + mean * torch.special.ndtr(place)


def _after(steps: tuple[Step, ...] | None, signal: Signal | None) -> Signal | None:
    """The signal behind steps, None where its mean is not known any more."""
    for step in steps or ():
        if signal is None:
            return None
        mean, deviation = signal.mean, signal.deviation
        flat = _flat(signal.flat, [step])
        if flat is None or step in (Step.LEAKY, Step.LARGEST):
            return None
        if step in (Step.RELU, Step.CLIPPED):
            if deviation is None:
                return None
            beyond = rectified_mean(mean - 6, deviation) if step is Step.CLIPPED else 0
            mean = rectified_mean(mean, deviation) - beyond
        changed = step in (Step.RELU, Step.CLIPPED, Step.AVERAGE)
        signal = Signal(mean, None if changed else deviation, flat)
    return None if steps is None else signal


def _flat(flat: bool, steps: list[Step]) -> bool | None:
    """Whether channels are the last dimension behind steps; None if they may be mixed."""
    for step in steps:
        if step in (Step.AVERAGE, Step.LARGEST, Step.FLATTEN):
            if flat:
                return None
            flat = step is Step.FLATTEN
    return flat


def _groups(layer: nn.Module) -> int:
    return getattr(layer, "groups", 1)


def _simple(layer: nn.Module) -> bool:
    """Whether a layer is no grouped convolution other than one channel to one, depthwise."""
    groups = _groups(layer)
    return groups == 1 or groups == layer.weight.shape[0] * layer.weight.shape[1]


def _fits(layer: nn.Module, flat: bool, channels: Tensor) -> bool:
    """Whether each input channel of a layer is one of the channels (rows of a tensor)."""
    linear = isinstance(layer, nn.Linear)
    return linear == flat and len(channels) == layer.weight.shape[1] * _groups(layer)


def _steps_of_module(module: nn.Module) -> tuple[Step, ...] | None:
    if isinstance(module, nn.Flatten):
        return (Step.FLATTEN,) if (module.start_dim, module.end_dim) == (1, -1) else None
    if getattr(module, "return_indices", False):
        return None
    steps = [step for kind, step in _MODULES.items() if isinstance(module, kind)]
    return tuple(steps) if len(steps) == 1 else None


def _steps_of_call(node: fx.Node) -> tuple[Step, ...] | None:
    def argument(place: int, name: str, default: Any) -> Any:
        return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)

    target: Callable | str = node.target
    if target in (torch.flatten, "flatten"):
        whole = argument(1, "start_dim", 0) == 1 and argument(2, "end_dim", -1) == -1
        return (Step.FLATTEN,) if whole else None
    if target in (torch.mean, "mean"):
        dims = argument(1, "dim", ())
        if not isinstance(dims, tuple | list) or sorted(dims) not in ([2, 3], [-2, -1]):
            return None
        return (Step.AVERAGE,) if argument(2, "keepdim", False) else (Step.AVERAGE, Step.FLATTEN)
    return (_CALLS[target],) if target in _CALLS else None
