"""What the layers of a network are given on calibration inputs, a few layers at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jlcm.hooks import stopping
from jlcm.learning.decoder import decoder_layers
from jlcm.learning.products import Product, watching_products
from jlcm.learning.sequential import joined


@dataclass(frozen=True)
class Stage:
    """A part of a network that runs by itself.

    Attributes:
        names: of its weights.
        run: runs it on a batch of the calibration inputs, by number.
    """

    names: list[str]
    run: Callable[[int], Any]


@dataclass
class Inputs:
    """Inputs of a weight over all calibration inputs, as columns (groups, n, positions).

    Attributes:
        size: (groups, n) float64, sum of their magnitudes; `Observation` makes it the mean.
        gram: (groups, n, n) float64, sum of X X^T; None where it is not asked for.
        count: of positions.
        kept: some of the columns, float32.
    """

    size: Tensor
    gram: Tensor | None
    count: int = 0
    kept: list[Tensor] | Tensor = ()


@dataclass(frozen=True)
class Observation:
    """What a stage was given.

    Attributes:
        inputs: by weight, `size` and `gram` as float32 means and `kept` as one tensor. Weights that
            do not run, or are no plain product, are missing.
        calls: by name of a block, its arguments and keywords of each batch.
    """

    inputs: dict[str, Inputs]
    calls: dict[str, list[tuple[tuple, dict]]]


def stages(
    model: nn.Module, units: Sequence[Sequence[str]], batches: Sequence[Tensor], most: int
) -> Iterator[Stage]:
    """Parts of a network in forward order, each to be run on all batches before the next.

    A language model of transformers runs one decoder layer after the other, everything else from
    its inputs for every part.

    Args:
        model: in evaluation mode, its function the same from stage to stage.
        units: names of weights that belong to one part.
        batches: calibration inputs on the model's device.
        most: weights of a part, unless it is a decoder layer or a unit has more.
    """
    rest, name = list(units), decoder_layers(model)
    if name is not None:
        hidden, others = _entrance(model, model.get_submodule(name), batches)
        for i, layer in enumerate(model.get_submodule(name)):
            inside = [unit for unit in rest if unit[0].startswith(f"{name}.{i}.")]
            rest = [unit for unit in rest if unit not in inside]

            def run(number: int, i: int = i, layer: nn.Module = layer) -> None:
                args, kwargs = others[batches[number].shape][i]
                output = layer(hidden[number], *args, **kwargs)
                hidden[number] = output[0] if isinstance(output, tuple) else output

            yield Stage([weight for unit in inside for weight in unit], run)
    part: list[str] = []
    for unit in rest:
        if part and len(part) + len(unit) > most:
            yield Stage(part, lambda number: model(batches[number]))
            part = []
        part = [*part, *unit]
    if part:
        yield Stage(part, lambda number: model(batches[number]))


@torch.no_grad()
def observe(
    model: nn.Module,
    stage: Stage,
    batches: Sequence[Tensor],
    *,
    grams: set[str],
    blocks: set[str],
    positions: int,
    kept: int,
    seed: int = 0,
) -> Observation:
    """Run a stage on all batches and look at what its layers are given.

    Args:
        model: owner of the layers.
        stage: of the model.
        batches: calibration inputs on the model's device.
        grams: names of the weights whose inputs' Gram matrix is wanted.
        blocks: names of the modules whose arguments are wanted.
        positions: tokens or pixels of each calibration input that are looked at, at most.
        kept: columns that are kept of each weight, about.
        seed: of the sampling.
    """
    found: dict[str, Inputs] = {}
    calls: dict[str, list[tuple[tuple, dict]]] = {name: [] for name in blocks}
    total, number = sum(map(len, batches)), 0

    def see(name: str, product: Product) -> None:
        size = len(batches[number])
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        columns = joined(product.columns(product.sample(positions, size, generator), size).float())
        groups, n, count = columns.shape
        if name not in found:
            zeros = columns.new_zeros(groups, n, n, dtype=torch.float64) if name in grams else None
            found[name] = Inputs(columns.new_zeros(groups, n, dtype=torch.float64), zeros, 0, [])
        inputs = found[name]
        inputs.size += columns.abs().sum(-1)
        if inputs.gram is not None:
            inputs.gram += columns @ columns.mT
        inputs.count += count
        step = max(count * total // (kept * size), 1)
        inputs.kept.append(columns[..., ::step].cpu())

    with ExitStack() as stack:
        stack.enter_context(watching_products(model, stage.names, see))
        for name in blocks:
            module, keep = model.get_submodule(name), calls[name]
            hook = module.register_forward_pre_hook(
                lambda _, args, kwargs, keep=keep: keep.append((args, kwargs)), with_kwargs=True
            )
            stack.callback(hook.remove)
        for number in range(len(batches)):  # noqa: B007 - `see` reads it
            stage.run(number)
    for name, inputs in found.items():
        if not inputs.size.isfinite().all():
            raise ValueError(f"inputs of {name} are NaN or infinite on the calibration inputs")
        inputs.size = (inputs.size / inputs.count).float()
        inputs.gram = None if inputs.gram is None else (inputs.gram / inputs.count).float()
        inputs.kept = torch.cat(inputs.kept, -1)[..., :kept]
    return Observation(found, calls)


@torch.no_grad()
def _entrance(
    model: nn.Module, layers: nn.ModuleList, batches: Sequence[Tensor]
) -> tuple[list[Tensor], dict[torch.Size, list[tuple[tuple, dict]]]]:
    """Hidden states before the first decoder layer, by batch, and by shape of a batch what else
    each of the layers is given: masks and rotary embeddings, since no input is padded.
    """  # noqa: D205
    hidden, others = [], {}
    for batch in batches:
        if batch.shape not in others:
            calls: list[tuple[tuple, dict]] = []
            with ExitStack() as stack:
                for layer in layers:
                    hook = layer.register_forward_pre_hook(
                        lambda _, args, kwargs: calls.append((args[1:], dict(kwargs))),  # noqa: B023
                        with_kwargs=True,
                    )
                    stack.callback(hook.remove)
                model(batch, use_cache=False)
            others[batch.shape] = calls
        with stopping(layers[0]) as found:
            model(batch, use_cache=False)
        hidden.append(found[0][0][0])
    return hidden, others
