"""AWQ: input channels that carry large activations are scaled up before rounding.

Lin et al., "AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and
Acceleration", MLSys 2024. Columns of a weight are multiplied by powers of the mean magnitudes of
their inputs, the operation before is divided by the same, and the exponent is the one whose rounded
weights change the outputs least. Then the range of every grid is clipped as far as this lowers the
error of its own outputs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from jlcm.config import Invalid
from jlcm.learning.calibration import split_inputs
from jlcm.learning.forward import running, split_sequences, to_device
from jlcm.methods.grid import Grid, group_size, join_groups, split_groups
from jlcm.methods.network import Network
from jlcm.methods.observe import Observation, observe, stages
from jlcm.methods.rtn import RTN, check_group
from jlcm.methods.scalings import Scaling, find_scalings, fold
from jlcm.packed import StoredWeight

#: Exponents of the mean magnitudes: 0, 0.05, ..., 0.95. Ranges: the whole, 0.95, ..., 0.55 of it.
EXPONENTS = tuple(i / 20 for i in range(20))
RANGES = tuple(1 - i / 20 for i in range(10))
#: Weights that are observed at the same time in a network without decoder layers.
_TOGETHER = 16
#: Elements of the outputs that the clipping search works on at a time.
_ELEMENTS = 2**24
#: Projections that are not clipped, since queries and keys are multiplied with each other.
_NOT_CLIPPED = {
    "q_proj", "k_proj", "qkv", "qkv_proj", "query", "key", "query_key_value", "in_proj_weight",
    "q_proj_weight", "k_proj_weight",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AWQ:
    """Options of AWQ.

    Attributes:
        group: columns of a row that share a scale and a zero point; None for the whole row. The
            paper has 128.
        symmetric: grids around zero, without zero points.
        scale: scale input channels.
        clip: clip ranges.
        clip_tokens: tokens or pixels that the clipping looks at.
        positions: tokens or pixels of each calibration input that the scaling looks at, at most.
        forward_batch: calibration inputs that run at once; fewer for long sequences of tokens.
    """

    group: int | None = None
    symmetric: bool = False
    scale: bool = True
    clip: bool = True
    clip_tokens: int = 512
    positions: int = 512
    forward_batch: int = 32

    def __post_init__(self) -> None:
        """Check the choices and the ranges."""
        check_group(self.group)
        for name in ("symmetric", "scale", "clip"):
            if not isinstance(getattr(self, name), bool):
                raise Invalid(f"{name}={getattr(self, name)!r} must be true or false")
        for name in ("clip_tokens", "positions", "forward_batch"):
            if getattr(self, name) < 1:
                raise Invalid(f"{name}={getattr(self, name)} must be at least 1")

    def grid(self, parts: Tensor, bits: int) -> Grid:
        """Grids from the smallest to the largest value of each row."""
        return RTN(range="min_max", symmetric=self.symmetric).grid(parts, bits)


def awq(network: Network, options: AWQ) -> dict[str, StoredWeight]:
    """Scale input channels, clip ranges, round to nearest; changes `network.model` in place.

    Scales and ranges are chosen on what the original network gives its layers, as in the public
    code. The function of the unquantised network stays.

    Args:
        network: its weights and bits, and calibration inputs.
        options: of the method.

    Returns:
        The stored weights by name.

    Raises:
        ValueError: no calibration inputs, or activations that are NaN or infinite.
    """
    model, home = network.model, next(network.model.parameters()).device
    model.to(network.device)
    batches = [
        to_device(part, network.device)
        for batch in split_inputs(network.calibration, options.forward_batch)
        for part in split_sequences(batch, options.forward_batch)
    ]
    scalings = find_scalings(model, network.norms, batches[0][:2]) if options.scale else []
    scalings = [s for s in scalings if not network.weights.keys().isdisjoint(s.consumers)]
    kept, factors = _choose(network, options, batches, scalings)
    for scaling, chosen in factors:
        fold(model, scaling, chosen)
        for name in kept.keys() & set(scaling.consumers):
            kept[name] = kept[name] / _per_column(chosen, kept[name].shape[1])[:, None].cpu()
    _describe(network, options, [scaling for scaling, _ in factors], kept)
    found = {
        name: _round(name, weight, network.bits[name], kept.get(name), options)
        for name, weight in network.weights.items()
    }
    model.to(home)
    return found


def _choose(
    network: Network, options: AWQ, batches: list[Tensor], scalings: list[Scaling]
) -> tuple[dict[str, Tensor], list[tuple[Scaling, Tensor]]]:
    """Columns of inputs that are kept for clipping, by weight, and the scalings with factors."""
    model, weights = network.model, network.weights
    scaled = {name for scaling in scalings for name in scaling.consumers}
    units = [list(scaling.consumers) for scaling in scalings]
    units += [[name] for name in weights if name not in scaled]
    kept: dict[str, Tensor] = {}
    factors: list[tuple[Scaling, Tensor]] = []
    bar = tqdm(
        total=len(weights), desc="scale", unit="layer", disable=not network.progress, leave=False
    )
    for stage in stages(model, units, batches, _TOGETHER):
        here = [scaling for scaling in scalings if scaling.consumers[0] in stage.names]
        seen = observe(
            model,
            stage,
            batches,
            grams={n for s in here if s.block is None for n in s.consumers if n in weights},
            blocks={s.block for s in here if s.block is not None},
            positions=options.positions,
            kept=options.clip_tokens,
            seed=network.seed,
        )
        kept |= {
            name: inputs.kept
            for name, inputs in seen.inputs.items()
            if name in weights and inputs.kept.shape[1] == weights[name][0].numel()
        }
        for scaling in here:
            if all(name in seen.inputs for name in scaling.consumers):
                factors.append((scaling, search_scales(network, scaling, seen, options)))
        bar.update(len(weights.keys() & set(stage.names)))
    bar.close()
    return kept, factors


@torch.no_grad()
def search_scales(network: Network, scaling: Scaling, seen: Observation, options: AWQ) -> Tensor:
    """Factors of the input channels with which rounded weights change the outputs least.

    Args:
        network: its weights and bits.
        scaling: whose consumers are to be scaled. With a block the error is that of the block's
            output, else that of the consumers' own outputs.
        seen: by the stage that the consumers belong to.
        options: of the method.

    Returns:
        (channels,) float32, positive.
    """
    names = [name for name in scaling.consumers if name in network.weights]
    weights = {name: network.weights[name].detach() for name in names}
    channels = weights[names[0]].shape[1]
    size = seen.inputs[names[0]].size.view(channels, -1).mean(1)
    error = _output_error(network, scaling, seen)
    best, least = torch.ones_like(size), torch.inf
    for exponent in EXPONENTS:
        factors = size.pow(exponent).clamp(min=1e-4)
        factors = factors / (factors.max() * factors.min()).sqrt()
        rounded = {
            name: rounded_with(weight, factors, network.bits[name], options)
            for name, weight in weights.items()
        }
        if (found := error(rounded)) < least:
            best, least = factors, found
    return best


def rounded_with(weight: Tensor, factors: Tensor, bits: int, options: AWQ) -> Tensor:
    """A weight whose columns are scaled, rounded and scaled back; its shape and dtype.

    Args:
        weight: (rows, channels, ...).
        factors: (channels,) float32, positive.
        bits: width of a code.
        options: kind of grid.
    """
    matrix = weight.float().reshape(len(weight), -1)
    columns = _per_column(factors, matrix.shape[1])
    parts = split_groups(matrix * columns, group_size(matrix.shape[1], options.group))
    grid = options.grid(parts, bits)
    values = join_groups(grid.values(grid.codes(parts)), *matrix.shape) / columns
    return values.view(weight.shape).to(weight.dtype)


@torch.no_grad()
def clipped(matrix: Tensor, columns: Tensor, bits: int, options: AWQ) -> Tensor:
    """Groups of columns clipped to the range whose rounding changes their outputs least.

    Args:
        matrix: (rows, columns) float32.
        columns: (groups of a convolution, columns, positions) float32, inputs.
        bits: width of a code.
        options: kind of grid.

    Returns:
        As `split_groups` of the matrix.
    """
    group = group_size(matrix.shape[1], options.group)
    size, whole = group or matrix.shape[1], split_groups(matrix, group)
    missing = -columns.shape[1] % size
    inputs = torch.nn.functional.pad(columns, (0, 0, 0, missing))
    inputs = inputs.view(len(columns), -1, size, columns.shape[2])
    parts = whole.view(len(columns), -1, inputs.shape[1], size)  # rows of a group, column groups
    few = max(_ELEMENTS // (len(columns) * inputs.shape[1] * columns.shape[2]), 1)
    chosen = [_best_range(rows, inputs, bits, options) for rows in parts.split(few, dim=1)]
    reach = torch.cat(chosen, 1).reshape(-1, 1) * whole.abs().amax(1, keepdim=True)
    return whole.clamp(-reach, reach)


def _best_range(rows: Tensor, inputs: Tensor, bits: int, options: AWQ) -> Tensor:
    """(groups, rows, column groups) factors of the ranges."""
    flat = rows.reshape(-1, rows.shape[-1])
    reach = flat.abs().amax(1, keepdim=True)
    best = rows.new_ones(rows.shape[:3])
    least = torch.full_like(best, torch.inf)
    for part in RANGES:
        inside = flat.clamp(-part * reach, part * reach)
        grid = options.grid(inside, bits)
        wrong = (grid.values(grid.codes(inside)) - flat).view(rows.shape)
        errors = torch.einsum("argk,agkm->argm", wrong, inputs).square().sum(-1)
        best = torch.where(errors < least, part, best)
        least = torch.minimum(errors, least)
    return best


def _round(
    name: str, weight: Tensor, bits: int, columns: Tensor | None, options: AWQ
) -> StoredWeight:
    matrix = weight.detach().float().reshape(len(weight), -1)
    group = group_size(matrix.shape[1], options.group)
    owner, _, tensor = name.rpartition(".")
    clips = options.clip and not {tensor, owner.rpartition(".")[2]} & _NOT_CLIPPED
    if clips and columns is not None:
        parts = clipped(matrix, columns.to(matrix.device), bits, options)
    else:
        parts = split_groups(matrix, group)
    grid = options.grid(parts, bits)
    codes = join_groups(grid.codes(parts), *matrix.shape)
    return grid.stored(codes, tuple(weight.shape), weight.dtype, group=group).cpu()


def _per_column(factors: Tensor, columns: int) -> Tensor:
    """(columns,) factors of a matrix, whose columns are channels or taps of channels."""
    return factors.repeat_interleave(columns // len(factors))


def _output_error(
    network: Network, scaling: Scaling, seen: Observation
) -> Callable[[dict[str, Tensor]], float]:
    """Squared error of the outputs of the block, or of each layer, with given weights in place."""
    if scaling.block is None:

        def of_layers(weights: dict[str, Tensor]) -> float:
            error = 0.0
            for name, weight in weights.items():
                wrong = (weight - network.weights[name]).float().reshape(len(weight), -1)
                error += float(((wrong @ seen.inputs[name].gram[0]) * wrong).double().sum())
            return error

        return of_layers
    block = network.model.get_submodule(scaling.block)

    def outputs() -> Iterator[Tensor]:
        for args, kwargs in seen.calls[scaling.block]:
            with running(network.calibration[0], network.device):
                output = block(*args, **kwargs)
            yield (output[0] if isinstance(output, tuple) else output).float()

    goal = list(outputs())

    def of_block(weights: dict[str, Tensor]) -> float:
        with _weights(network, weights):
            pairs = zip(outputs(), goal, strict=True)
            return sum(float((output - right).double().square().sum()) for output, right in pairs)

    return of_block


@contextmanager
def _weights(network: Network, values: dict[str, Tensor]) -> Iterator[None]:
    """Other values of weights while this is active."""
    kept = {name: network.weights[name].data for name in values}
    try:
        for name, value in values.items():
            network.weights[name].data = value
        yield
    finally:
        for name, value in kept.items():
            network.weights[name].data = value


def _describe(
    network: Network, options: AWQ, scalings: list[Scaling], kept: dict[str, Tensor]
) -> None:
    """Note what the paper has otherwise, and what could not be done."""
    weights = network.weights.keys()
    scaled = weights & {name for scaling in scalings for name in scaling.consumers}
    if options.scale and not scaled:
        network.notes.append("nothing is scaled: no operation before a layer can take its scales")
    elif options.scale and len(scaled) < len(weights):
        network.notes.append(
            f"{len(weights - scaled)} of {len(weights)} weights are not scaled: no operation "
            "before them can take the scales"
        )
    if options.clip and (unseen := weights - kept.keys()):
        network.notes.append(
            f"{len(unseen)} weights are not clipped: they do not run on the calibration inputs or "
            "are no plain product"
        )
    if options.group is None:
        network.notes.append("a grid belongs to a row, in the paper to 128 columns of it")
