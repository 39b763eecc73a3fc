"""What modules are given in networks that torch.fx cannot trace, without running all of them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from jlcm.hooks import Stopped, stopping
from jlcm.learning.activations import Activations

#: Arguments that are the same whenever a module runs again on kept ones.
_PLAIN = (Tensor, int, float, str, torch.dtype, torch.device, torch.Size, type(None))
#: Part of the memory that the arguments of a module may take, which has others around it.
_SHARE = 4


class NestedCalls:
    """Arguments of modules in two networks of the same structure.

    A forward is a call of modules inside modules. Where one that has several layers inside runs
    once, its arguments are kept when its first layer is asked for, and it alone runs for the
    others: a layer of an attention needs the attention, not the network. Layers must be asked for
    in the order in which they run, and change only after they were.
    """

    def __init__(
        self,
        modules: tuple[dict[str, nn.Module], dict[str, nn.Module]],
        inputs: Sequence[Tensor],
        *,
        memory: int,
        folder: Path | None,
        device: torch.device,
    ) -> None:
        """Start at the networks themselves.

        Args:
            modules: of both networks, by name; "" is the network.
            inputs: batches of calibration inputs.
            memory: bytes of arguments kept in memory.
            folder: where the rest lies for a while.
            device: of the networks.
        """
        self._modules, self._inputs, self._device = modules, inputs, device
        self._memory, self._folder = memory // _SHARE, folder
        self._kept: list[tuple[str, Activations, TreeSpec]] = []
        self._around: dict[str, list[str]] = {}
        self._unfit: set[str] = set()

    def plan(self, calls: Sequence[str], layers: Sequence[str]) -> None:
        """Choose the modules whose arguments are kept.

        Args:
            calls: names of the modules in the order in which they run.
            layers: names of those that will be asked for.
        """
        counts, inside = Counter(calls), Counter()
        for layer in set(layers):
            inside.update(_owners(layer))
        for layer in layers:
            chosen, most = [], len(set(layers))
            for owner in _owners(layer):
                if counts[owner] == 1 and 1 < inside[owner] < most:
                    chosen.append(owner)
                    most = inside[owner]
            self._around[layer] = chosen

    def __call__(self, module: str) -> Iterator[tuple[tuple[tuple, dict], ...]]:
        """Positional and keyword arguments of a module in both networks, batch by batch.

        Raises:
            NotImplementedError: it does not run on every batch.
        """
        around = self._around.get(module, [])
        while self._kept and self._kept[-1][0] not in around:
            self._kept.pop()
        known = [name for name, _, _ in self._kept]
        for owner in around:
            if owner not in known and owner not in self._unfit and not self._keep(owner):
                self._unfit.add(owner)
        for number in range(len(self._inputs)):
            yield tuple(self._stopped(model, number, module) for model in range(2))

    @torch.no_grad()
    def _keep(self, module: str) -> bool:
        """Keep the arguments of a module, if it makes of them what it does in its network."""
        kept, structure = Activations(self._memory, self._folder), None
        if not self._repeats(module):
            return False
        for number in range(len(self._inputs)):
            calls = [tree_flatten(self._stopped(model, number, module)) for model in range(2)]
            structure = structure or calls[0][1]
            if any(spec != structure for _, spec in calls):
                return False
            kept.put(number, tuple(dict(enumerate(leaves)) for leaves, _ in calls))
        self._kept.append((module, kept, structure))
        return True

    def _repeats(self, module: str) -> bool:
        """Whether a module of the reference returns the same once more on the same arguments."""
        seen: list[tuple[tuple, dict, Any]] = []

        def stop(_: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            seen.append((args, kwargs, output))
            raise Stopped

        hook = self._modules[1][module].register_forward_hook(stop, with_kwargs=True)
        try:
            self._run(1, 0)
        except Stopped:
            pass
        finally:
            hook.remove()
        if not seen or not all(isinstance(leaf, _PLAIN) for leaf in tree_leaves(seen[0][:2])):
            return False
        args, kwargs, output = seen[0]
        try:
            again = self._modules[1][module](*args, **kwargs)
        except Exception:  # it needs more than its arguments
            return False
        pairs = zip(tree_leaves(output), tree_leaves(again), strict=False)
        return all(torch.allclose(a, b, 1e-3, 1e-5) for a, b in pairs if isinstance(a, Tensor))

    def _run(self, model: int, number: int) -> None:
        """Run the innermost module whose arguments are kept on those of a batch."""
        if not self._kept:
            self._modules[model][""](self._inputs[number].to(self._device))
            return
        module, kept, structure = self._kept[-1]
        leaves = [
            # Copies, because modules may work in place.
            leaf.to(self._device, copy=True) if isinstance(leaf, Tensor) else leaf
            for leaf in kept.get(number)[model].values()
        ]
        args, kwargs = tree_unflatten(leaves, structure)
        self._modules[model][module](*args, **kwargs)

    def _stopped(self, model: int, number: int, module: str) -> tuple[tuple, dict]:
        with stopping(self._modules[model][module]) as found:
            self._run(model, number)
        if not found:
            raise NotImplementedError("it does not run on every calibration batch")
        return found[0]


def _owners(module: str) -> list[str]:
    """Names of the modules around a module, the outermost first, without the network itself."""
    parts = module.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]
