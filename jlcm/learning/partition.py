"""How a network is cut into blocks, and what the original's blocks return.

A block is a run of the network's graph that begins and ends where one tensor alone is live, such as
a residual block. Blocks do not end inside a small module that holds several layers, such as an
inverted residual without a skip: BRECQ (Li et al., 2021) takes the blocks of the architecture.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from jlcm.layers import stored_tensors
from jlcm.learning.activations import Tensors
from jlcm.learning.calibration import Calibration
from jlcm.packed import StoredWeight

#: Packed weights of a module at most that blocks keep together; larger ones are stages.
MOST_WEIGHTS = 8
#: Modules that only hold others.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Block:
    """Nodes from `start` up to `stop` of the graph, and the stored tensors that they read."""

    start: int
    stop: int
    weights: list[str]
    tensors: set[str]

    @property
    def name(self) -> str:
        """Its first and last packed weight."""
        return f"{self.weights[0]} .. {self.weights[-1]}"


def find_blocks(calibration: Calibration, least: int) -> list[Block]:
    """Shortest runs between single live tensors with at least so many packed weights.

    The norm and the activation after a layer belong to its block: the norm may hold a part of the
    weight. The first dimension of these tensors counts the inputs.
    """
    owners: dict[str, list[str]] = {}
    kinds = dict(stored_tensors(calibration.packed))
    for name in kinds:
        owners.setdefault(name.rpartition(".")[0], []).append(name)
    called = [_called(node, owners) for node in calibration.nodes]
    packed = [[name for name in names if isinstance(kinds[name], StoredWeight)] for names in called]
    last = {name: i for i, names in enumerate(packed) for name in names}
    ends = _ends_of_modules(calibration.packed, last, least)
    blocks, start, stop, weights, tensors, beyond = [], 0, 0, [], set(), set()
    rows = torch.arange(len(calibration.inputs[0])) < 2
    state = calibration.state(0, model=1, rows=rows)
    for i, node in enumerate(calibration.nodes):
        if packed[i] and stop > start:
            blocks.append(Block(start, stop, weights, tensors))
            start, weights, tensors = stop, [], set()
        weights, beyond = weights + packed[i], beyond | set(called[i])
        calibration.run(1, state, i, i + 1)
        value = state.get(node)
        inputs_first = isinstance(value, Tensor) and value.dim() and len(value) == int(rows.sum())
        # Defaults of the network's arguments are no values that blocks hand on.
        live = [n for n, v in state.items() if n.op != "placeholder" or isinstance(v, Tensor)]
        whole = all(ends[name] <= i for name in weights)
        follows = stop <= start or (stop == i and calibration.completes(node))
        if inputs_first and live == [node] and whole and follows and len(weights) >= least:
            stop, tensors, beyond = i + 1, tensors | beyond, set()
    blocks.append(Block(start, len(calibration.nodes), weights, tensors | beyond))
    return [block for block in blocks if block.weights]


class BlockOutputs(Tensors):
    """Wanted outputs of a block, float32: one tensor for each batch of calibration inputs.

    Attributes:
        variance: of all their elements.
    """

    @torch.no_grad()
    def __init__(self, calibration: Calibration, block: Block) -> None:
        """Run the original's block on all calibration inputs, whose states before it are kept."""
        super().__init__(calibration.memory, calibration.folder)
        end = calibration.nodes[block.stop - 1]
        count = total = squared = 0.0
        for number, _ in enumerate(calibration.states(block.start, keep=True)):
            state = calibration.state(number, model=1)
            calibration.run(1, state, block.start, block.stop)
            self[number] = output = state[end].float()
            count += output.numel()
            total += float(output.double().sum())
            squared += float(output.double().square().sum())
        self.variance = max(squared / count - (total / count) ** 2, 1e-30)


def _called(node: fx.Node, owners: dict[str, list[str]]) -> list[str]:
    """Stored tensors of the module that a node calls."""
    if node.op != "call_module":
        return []
    inside = f"{node.target}."
    return [n for owner, names in owners.items() if f"{owner}.".startswith(inside) for n in names]


def _ends_of_modules(network: nn.Module, last: dict[str, int], least: int) -> dict[str, int]:
    """Where the smallest module around each weight that has several has called the last of them.

    Args:
        network: packed.
        last: place in the graph where each packed weight is read last.
        least: weights that such a module has.
    """
    around = {name: _modules_around(name) for name in last}
    counts = Counter(module for modules in around.values() for module in modules)
    modules = dict(network.named_modules())
    several = {
        name
        for name, count in counts.items()
        if count >= least and not isinstance(modules[name], _CONTAINERS)
    }
    inner = {outer for name in several for outer in _modules_around(name)}
    small = {name for name in several - inner if counts[name] <= MOST_WEIGHTS}
    ends = {
        module: max(last[name] for name in around if module in around[name]) for module in small
    }
    return {
        name: max([place, *(ends[module] for module in around[name] if module in small)])
        for name, place in last.items()
    }


def _modules_around(name: str) -> list[str]:
    """Names of the modules that hold a module or a tensor, but for the network itself."""
    parts = name.split(".")[:-1]
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
