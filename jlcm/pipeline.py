"""A pipeline of diffusers as one network, so that every method treats it like any other.

Its inputs are calls of the components that `jlcm.record_calls` recorded, one sample a row: the
token ids of each text encoder, the arguments of the denoiser at one timestep, and a latent for the
VAE's decoder.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_leaves, tree_unflatten

from jlcm.layers import computing_dtype

#: Names of components that predict the noise, in diffusers' pipelines.
DENOISERS = ("unet", "transformer")
#: Outputs of the original that run at once where no gradients are needed.
_MOST_OUTPUTS = 2**22


def role(component: str) -> str | None:
    """What a component of a pipeline does: "text", "denoiser", "vae", None for others."""
    if component.startswith("text_encoder"):
        return "text"
    if component in DENOISERS:
        return "denoiser"
    return "vae" if component == "vae" else None


@dataclass(frozen=True)
class Leaf:
    """A tensor argument with a row for each sample.

    Attributes:
        shape: of a row.
        dtype: of the argument; None for the dtype that the component computes in.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None

    @property
    def size(self) -> int:
        """Values of a row."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Call:
    """How a component is called, and which of its outputs count.

    Attributes:
        method: that is called, "forward" or "decode".
        structure: of its positional and keyword arguments.
        leaves: of the arguments, a `Leaf` for each tensor with rows, other values as they are.
        outputs: places of the tensors that count among all that it returns.
        scales: what each of them is multiplied by.
    """

    method: str
    structure: TreeSpec
    leaves: tuple[Any, ...]
    outputs: tuple[int, ...] = (0,)
    scales: tuple[float, ...] = (1.0,)


@dataclass(frozen=True)
class Link:
    """An argument of the denoiser that is what text encoders returned.

    Attributes:
        leaf: place of the argument among the denoiser's leaves.
        parts: component and place among its outputs; several are joined in the last dimension.
    """

    leaf: int
    parts: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Format:
    """How a row of recorded calls is laid out.

    Attributes:
        calls: by name of the component, in the order in which they run. Their leaves lie one after
            another.
        links: for each the last columns have a number, 1 where it holds for the sample, else 0.
    """

    calls: dict[str, Call]
    links: tuple[Link, ...] = ()

    def __deepcopy__(self, memo: dict) -> "Format":
        """Nothing of it changes: copies of a network share it."""
        return self

    @property
    def features(self) -> int:
        """Columns of the recorded calls."""
        leaves = (leaf for call in self.calls.values() for leaf in call.leaves)
        return sum(leaf.size for leaf in leaves if isinstance(leaf, Leaf)) + len(self.links)


class PipelineNetwork(nn.Module):
    """The components of a pipeline; made by `jlcm.pipeline_network`.

    Attributes:
        output_distribution: outputs are means of normal distributions of variance 1.
        format: of the recorded calls; None before `jlcm.record_calls`.
    """

    output_distribution = "gaussian"

    def __init__(self, components: dict[str, nn.Module]) -> None:
        """Take the components under their names in the pipeline; they are shared, not copied."""
        super().__init__()
        for name, component in components.items():
            self.add_module(name, component)
        self.format: Format | None = None
        self._outputs = 0  # of a row, known after a forward
        self._record: list[dict[str, list[Tensor]]] | None = None
        self._known: Iterator[dict[str, list[Tensor]]] = iter(())
        self.eval()

    @property
    def components(self) -> dict[str, nn.Module]:
        """Components by name."""
        return dict(self.named_children())

    @property
    def evaluation_batch(self) -> int:
        """Samples that run at once where no gradients are needed."""
        return max(_MOST_OUTPUTS // max(self._outputs, 1), 1)

    @contextmanager
    def recorded(self) -> Iterator[list[dict[str, list[Tensor]]]]:
        """Keep what the components return in each forward."""
        self._record = []
        try:
            yield self._record
        finally:
            self._record = None

    @contextmanager
    def repeating(self, record: list[dict[str, list[Tensor]]], component: str) -> Iterator[None]:
        """Run forwards on recorded calls again, of which one component has changed.

        Args:
            record: of `recorded`.
            component: that runs, with those that are given what it returns.
        """
        linked = any(owner == component for link in self.format.links for owner, _ in link.parts)
        changed = {component, *(DENOISERS if linked else ())}
        known = [{n: o for n, o in done.items() if n not in changed} for done in record]
        self._known = iter(known)
        try:
            yield
        finally:
            self._known = iter(())

    def compute_in(self, dtype: torch.dtype) -> "PipelineNetwork":
        """Choose the dtype that all components compute in, in place."""
        for component in self.components.values():
            getattr(component, "compute_in", component.to)(dtype)
        return self

    def forward(self, calls: Tensor) -> Tensor:
        """Run the components on recorded calls.

        Where the denoiser was given what a text encoder returned, it is given what the text encoder
        returns now.

        Args:
            calls: (n, features) float32, of `jlcm.record_calls`.

        Returns:
            (n, outputs) float32: what text encoders, denoiser and VAE return. The squared error of
                each component's part of a row, summed up, is its mean squared error over the
                variance of its original's outputs, times its weight.

        Raises:
            ValueError: no calls were recorded, or they are of another format.
        """
        if self.format is None:
            raise ValueError("the network has no recorded calls: call jlcm.record_calls first")
        if calls.dim() != 2 or calls.shape[1] != self.format.features:
            raise ValueError(
                f"recorded calls (n, {self.format.features}) are expected, not {tuple(calls.shape)}"
            )
        parts = []
        for name, outputs in self.run(calls):
            call = self.format.calls[name]
            chosen = (outputs[place].float().flatten(1) for place in call.outputs)
            parts += [o * scale for o, scale in zip(chosen, call.scales, strict=True)]
        self._outputs = sum(part.shape[1] for part in parts)
        return torch.cat(parts, 1)

    def run(self, calls: Tensor) -> Iterator[tuple[str, list[Tensor]]]:
        """Name and returned tensors of each component, in the order in which they run."""
        known, done = next(self._known, {}), {}
        if self._record is not None:
            self._record.append(done)
        start, flags = 0, calls[:, calls.shape[1] - len(self.format.links) :] > 0
        for name, call in self.format.calls.items():
            component = self.get_submodule(name)
            dtype, leaves = computing_dtype(component), []
            for leaf in call.leaves:
                if isinstance(leaf, Leaf):
                    rows = calls[:, start : start + leaf.size].to(leaf.dtype or dtype)
                    start, leaf = start + leaf.size, rows.reshape(-1, *leaf.shape)
                elif isinstance(leaf, Tensor):
                    leaf = leaf.to(calls.device)
                leaves.append(leaf)
            if role(name) == "denoiser":
                for link, flag in zip(self.format.links, flags.unbind(1), strict=True):
                    live = torch.cat([done[owner][place] for owner, place in link.parts], -1)
                    given = leaves[link.leaf]
                    flag = flag.view(-1, *[1] * (given.dim() - 1))
                    leaves[link.leaf] = torch.where(flag, live.to(given.dtype), given)
            if name in known:
                done[name] = known[name]
            else:
                args, kwargs = tree_unflatten(leaves, call.structure)
                function = getattr(component, call.method)
                if call.method == "forward":
                    function = component  # with its hooks
                done[name] = returned_tensors(function(*args, **kwargs))
            yield name, done[name]


def returned_tensors(output: Any) -> list[Tensor]:
    """All tensors that a component returned, in order."""
    output = output.to_tuple() if hasattr(output, "to_tuple") else output
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
