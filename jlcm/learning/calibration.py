"""What each layer sees on the calibration inputs, in the compressed network and in its reference.

Both networks run side by side, layer by layer in forward order. Where torch.fx can trace the
network, activations are kept on the way and only the nodes after them run again; elsewhere the
arguments of modules around a layer are.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from jlcm.layers import STORE, HalfTensor, is_static_norm
from jlcm.learning.activations import Activations, State
from jlcm.learning.nested import NestedCalls
from jlcm.learning.products import noting_calls, output_columns, product_of
from jlcm.packed import StoredWeight

#: Activations that treat every element alike, so that sampled columns suffice.
_ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.ELU,
    nn.Sigmoid, nn.Tanh, nn.Mish, nn.Softplus, nn.Hardsigmoid,
)  # fmt: skip
_ELEMENTWISE_NAMES = {
    "relu", "relu_", "relu6", "gelu", "silu", "hardswish", "hardtanh", "leaky_relu", "elu",
    "sigmoid", "tanh", "mish", "softplus", "hardsigmoid",
}  # fmt: skip
#: Sampled positions of a layer at the least: statistics of an output need about so many.
LEAST_POSITIONS = 2**15
#: Inputs of a layer at the least, and part of their positions that is sampled at the most, as far
#: as there are more inputs: early layers of a network for images need few of them.
LEAST_INPUTS, MOST_SAMPLED = 256, 0.25
#: Nodes of the graph that run again rather than have large activations written to disk.
RERUN = 16


@dataclass(frozen=True)
class Layer:
    """A packed weight and its place in the network.

    Attributes:
        name: full name of the tensor.
        module: name of the module that is called.
        norm: name of the batch norm that alone follows, None if there is none.
        folded: whether that norm is folded into the packed weight and applies nothing there.
        activation: elementwise function that directly follows (the norm), None if there is none.
        position: in the traced graph, or 0.
    """

    name: str
    module: str
    norm: str | None = None
    folded: bool = False
    activation: Callable[[Tensor], Tensor] | None = None
    position: int = 0


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        parts = [child for child, _ in module.named_children() if child != STORE]
        return is_static_norm(module) or not parts or super().is_leaf_module(module, name)


class Calibration:
    """Runs both networks on the calibration inputs.

    Attributes:
        layers: packed weights in forward order.
        skipped: reason by name of each packed weight that cannot be learned.
        memory: bytes of activations kept in memory.
        folder: where the rest goes for a while, None for the system's place.
        weights: by name of module what each position of its output counts (inputs, positions);
            in those that are missing all count alike.
    """

    def __init__(
        self,
        packed: nn.Module,
        reference: nn.Module,
        batches: Sequence[Tensor] | Tensor,
        *,
        forward_batch: int,
        memory: int,
        positions: int,
        held_out: float,
        seed: int,
        device: torch.device,
        folder: Path | None = None,
        flip: bool = False,
        precision: str = "fp32",
        weights: dict[str, Tensor] | None = None,
    ) -> None:
        """Trace the networks and list their layers.

        Args:
            packed: compressed network.
            reference: its full-precision twin.
            batches: calibration inputs, first dimension the inputs of a batch.
            forward_batch: inputs that run at once.
            memory: bytes of activations kept in memory, both networks together.
            positions: columns sampled for each input of a neuron, over all calibration inputs; at
                least `LEAST_POSITIONS`.
            held_out: part of the inputs that is told apart.
            seed: of the sampling.
            device: where the networks run, and stay.
            folder: where activations past `memory` go for a while.
            flip: add mirror images of the inputs, if these are images.
            precision: of decoder networks (`jlcm.Learn`); others run in their own.
            weights: as the attribute, without `flip`; None for none.

        Raises:
            ValueError: too few calibration inputs, or not finite ones.
        """
        self.packed, self.reference, self.device = packed, reference, device
        self.positions, self.seed, self.precision = positions, seed, precision
        self.memory, self.folder = memory, folder
        self._kept = Activations(memory, folder)
        self.weights = weights or {}
        self.inputs = split_inputs(batches, forward_batch)
        self.every = max(2, round(1 / held_out))
        count = sum(len(batch) for batch in self.inputs)
        self._given = len(self.inputs)
        if flip and all(batch.dim() == 4 and batch.is_floating_point() for batch in self.inputs):
            self.inputs += [batch.flip(-1) for batch in self.inputs]
        self.count = sum(len(batch) for batch in self.inputs)
        if count < self.every:
            raise ValueError(
                f"{count} calibration inputs are too few: at least {self.every} are needed to hold "
                f"out a part of {held_out}"
            )
        self._modules = dict(packed.named_modules()), dict(reference.named_modules())
        packed.eval().to(device)
        reference.eval()
        self._trace()
        self._nested = NestedCalls(
            self._modules, self.inputs, memory=memory, folder=folder, device=device
        )
        self.layers, self.skipped = self._find_layers()

    def pairs(self, index: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        """Inputs of the compressed layer and outputs of the reference's, batch by batch.

        Args:
            index: of the layer in `layers`.

        Yields:
            The inputs as columns (inputs, groups, n, positions), the reference's outputs
            (inputs, groups, rows, positions), (inputs,) bool: which are held out, and what each
            position counts (inputs, positions), None where all count alike.

        Raises:
            NotImplementedError: the layer is not a plain matrix product or convolution.
        """
        layer, seen = self.layers[index], 0
        packed, reference = (modules[layer.module] for modules in self._modules)
        for number, arguments in enumerate(self._arguments(layer)):
            size = len(self.inputs[number])
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index * 1009 + number)
            (args, kwargs), (reference_args, reference_kwargs) = arguments
            product = product_of(layer.name, packed, args, kwargs)
            outputs = output_columns(layer.name, reference, reference_args, reference_kwargs)
            wanted = max(self.positions * product.length(), LEAST_POSITIONS)
            each = math.prod(product.sizes(size))
            used = min(max(math.ceil(wanted / each / MOST_SAMPLED), LEAST_INPUTS), self.count)
            chosen = product.sample(math.ceil(wanted / used), size, generator)
            weights = self.weights.get(layer.module)
            yield (
                product.columns(chosen, size),
                product.outputs(outputs, chosen, size),
                self.held(number),
                None if weights is None else weights[seen : seen + size, chosen].to(self.device),
            )
            if (seen := seen + size) >= used:
                break

    def _trace(self) -> None:
        self.reference.to(self.device)
        try:
            graph = _Tracer().trace(self.reference)
        except Exception:  # torch.fx raises many types; the slower way needs no graph
            self.nodes = None
            return
        self.nodes = [n for n in graph.nodes if n.op != "output"]
        output = next(n for n in graph.nodes if n.op == "output")
        self._place = {node: i for i, node in enumerate(self.nodes)}
        self._last = {
            node: max((self._place.get(u, len(self.nodes)) for u in node.users), default=-1)
            for node in self.nodes
        }
        self._output = output
        inputs = [n for n in self.nodes if n.op == "placeholder"]
        self._kept_at = [0] * len(self.inputs)
        defaults = {n: n.args[0] for n in inputs[1:] if n.args}
        for number, batch in enumerate(self.inputs):
            self._kept.put(number, ({inputs[0]: batch, **defaults}, {inputs[0]: batch, **defaults}))
        try:
            for model in range(2):
                env = self._kept.get(0)[model]
                small = {k: v[:1] if isinstance(v, Tensor) else v for k, v in env.items()}
                self.run(model, self._to_device(small), 0, len(self.nodes))
        except Exception:  # e.g. a traced branch that the inputs do not take
            self.nodes = None

    def _find_layers(self) -> tuple[list[Layer], dict[str, str]]:
        stored = {}
        for name, module in self.packed.named_modules():
            for tensor, held in getattr(module._modules.get(STORE), "items", dict)():
                if isinstance(held, StoredWeight):
                    stored.setdefault(name, []).append((tensor, held))
        calls = self._calls()
        counts = Counter(name for name, _ in calls)
        self._nested.plan([name for name, _ in calls], [n for n, _ in calls if n in stored])
        layers, skipped, seen = [], {}, set()
        for module, position in calls:
            names = [module] if module in stored else []
            if isinstance(self._modules[0][module], nn.MultiheadAttention):
                names.append(f"{module}.out_proj")
            for owner in names:
                for tensor, held in stored.get(owner, []):
                    full = f"{owner}.{tensor}" if owner else tensor
                    if id(held) in seen:
                        continue
                    seen.add(id(held))
                    following: tuple = (None, False, None)
                    if owner == module and counts[module] == 1:
                        following = self._following(position, counts)
                    layers.append(Layer(full, module, *following, position))
        for owner, tensors in stored.items():
            for tensor, held in tensors:
                if id(held) not in seen:
                    skipped[f"{owner}.{tensor}"] = "it does not run on the calibration inputs"
        return layers, skipped

    def _calls(self) -> list[tuple[str, int]]:
        """Modules in the order of their calls, with their places in the graph."""
        if self.nodes is not None:
            return [(n.target, i) for i, n in enumerate(self.nodes) if n.op == "call_module"]
        with noting_calls(self.reference, self._modules[1]) as calls:
            self.reference(self.inputs[0][:1].to(self.device))
        return [(name, 0) for name in calls]

    def _following(self, position: int, counts: Counter) -> tuple[str | None, bool, Any]:
        """Norm, whether it is folded, and activation that alone read the output of a node."""
        if self.nodes is None:
            return None, False, None
        norm, folded, node = None, False, _only_user(self.nodes[position])
        if node is not None and node.op == "call_module" and counts[node.target] == 1:
            held = self._modules[0][node.target]._modules.get(STORE)
            module = self._modules[1][node.target]
            if is_static_norm(module):
                norm = node.target
                folded = held is not None and not isinstance(held["weight"], HalfTensor)
                inner = getattr(module, "act", None)  # timm's norms carry their activation
                if inner is not None and not isinstance(inner, nn.Identity):
                    return norm, folded, inner if isinstance(inner, _ELEMENTWISE) else None
                node = _only_user(node)
        return norm, folded, None if node is None else self._elementwise(node)

    def _elementwise(self, node: fx.Node) -> Callable[[Tensor], Tensor] | None:
        if node.op == "call_module":
            module = self._modules[1][node.target]
            return module if isinstance(module, _ELEMENTWISE) else None
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        constant = not any(isinstance(a, fx.Node) for a in node.args[1:])
        if name not in _ELEMENTWISE_NAMES or not constant:
            return None
        rest, kwargs = node.args[1:], {k: v for k, v in node.kwargs.items() if k != "inplace"}
        if node.op == "call_method":
            return lambda values: getattr(values, name)(*rest, **kwargs)
        return lambda values: node.target(values, *rest, **kwargs)

    def completes(self, node: fx.Node) -> bool:
        """Whether a node is a batch norm or an elementwise activation."""
        module = self._modules[1].get(node.target) if node.op == "call_module" else None
        return is_static_norm(module) or self._elementwise(node) is not None

    def held(self, number: int) -> Tensor:
        """(inputs,) bool: which inputs of a batch are held out."""
        number %= self._given  # a mirror image goes with its original
        start = sum(len(batch) for batch in self.inputs[:number])
        place = torch.arange(start, start + len(self.inputs[number]))
        return place % self.every == self.every - 1

    def states(self, position: int, *, keep: bool | None = None) -> Iterator[tuple[State, State]]:
        """Live values of (compressed, reference) network before a node of the graph.

        Args:
            position: of the node. It must not decrease from call to call.
            keep: whether they are kept for `state`. None keeps them where they fit in memory, or
                where much would have to run again.
        """
        for number, start in enumerate(self._kept_at):
            states = self._kept.get(number)
            for model in range(2):
                # Copies, because nodes may work in place.
                state = self._to_device(states[model], copy=position > start)
                self.run(model, state, start, position)
                states[model].clear()
                states[model].update(self._live(state, position))
            far = position - start >= RERUN
            if far or self._kept.fits(number, states) if keep is None else keep:
                self._kept.put(number, states)
                self._kept_at[number] = position
            yield states

    def state(self, number: int, model: int, rows: Tensor | None = None) -> State:
        """A copy of a state that was kept, on the device: some inputs of a batch, None for all."""
        state = self._kept.get(number)[model]
        if rows is None:
            return self._to_device(state, copy=True)
        batch = len(rows)
        for node, value in state.items():
            if isinstance(value, Tensor) and value.dim() and len(value) == batch:
                state[node] = value[rows]
        return self._to_device(state)

    def _arguments(self, layer: Layer) -> Iterator[tuple[tuple[tuple, dict], ...]]:
        """Arguments of a layer's module in (compressed, reference) network, batch by batch."""
        if self.nodes is None:
            yield from self._nested(layer.module)
            return
        node = self.nodes[layer.position]
        for states in self.states(layer.position):
            yield tuple(
                (self._resolve(modules, node.args, env), self._resolve(modules, node.kwargs, env))
                for modules, env in zip(self._modules, states, strict=True)
            )

    def run(
        self,
        model: int,
        env: State,
        start: int,
        stop: int,
        *,
        modules: dict[str, nn.Module] | None = None,
    ) -> None:
        """Run the nodes from `start` up to `stop`, dropping what is not used any more.

        Args:
            model: 0 for the compressed network, 1 for the reference.
            env: values by node, changed in place.
            start: first node.
            stop: node after the last.
            modules: by name, in place of the network's own.
        """
        modules = modules or self._modules[model]
        for i in range(start, stop):
            node = self.nodes[i]
            if node.op in ("placeholder", "get_attr"):
                continue
            args, kwargs = (self._resolve(modules, a, env) for a in (node.args, node.kwargs))
            if node.op == "call_module":
                env[node] = modules[node.target](*args, **kwargs)
            elif node.op == "call_method":
                env[node] = getattr(args[0], node.target)(*args[1:], **kwargs)
            else:
                env[node] = node.target(*args, **kwargs)
            for used in [n for n in env if self._last[n] <= i]:
                del env[used]

    def output(self, env: State) -> Any:
        """What the network returns, from the values after its last node."""
        return map_arg(self._output.args[0], lambda node: env[node])

    def _resolve(self, modules: dict[str, nn.Module], arguments: Any, env: State) -> Any:
        def value(node: fx.Node) -> Any:
            if node.op != "get_attr":
                return env[node]
            owner, _, name = node.target.rpartition(".")
            return getattr(modules[owner], name)

        return map_arg(arguments, value)

    def _live(self, env: State, position: int) -> State:
        return {node: value for node, value in env.items() if self._last[node] >= position}

    def _to_device(self, env: State, *, copy: bool = False) -> State:
        return {
            k: v.to(self.device, copy=copy) if isinstance(v, Tensor) else v for k, v in env.items()
        }


def split_inputs(batches: Sequence[Tensor] | Tensor, size: int) -> list[Tensor]:
    """Calibration inputs in batches of at most `size`.

    Raises:
        ValueError: there are none, or they are no tensors, NaN or infinite.
    """
    batches = [batches] if isinstance(batches, Tensor) else list(batches)
    for number, batch in enumerate(batches):
        if not isinstance(batch, Tensor) or batch.dim() < 1:
            raise ValueError(f"calibration batch {number} is not a tensor of inputs")
        if batch.is_floating_point() and not batch.isfinite().all():
            raise ValueError(f"calibration batch {number} has NaN or infinite values")
    parts = [part for batch in batches for part in batch.split(size) if len(part)]
    if not parts:
        raise ValueError("the calibration set is empty")
    return parts


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
