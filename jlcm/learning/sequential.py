"""Learn a compressed network layer by layer, in forward order (Eq. 5 and 6).

Inputs come from the network as compressed so far, targets from the full-precision one, so each
layer also corrects the errors of those before it. Bytes never change: codes, codebooks and scales
keep their shapes, and what follows a layer anyway (bias, norm scale and shift) is re-estimated.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from jlcm.decoder import decoder_layers
from jlcm.layers import stored_tensors
from jlcm.learning.calibration import Calibration, split_inputs
from jlcm.learning.decoder import calibrate
from jlcm.learning.factors import Factors, unpack_factors
from jlcm.learning.layer import (
    Target,
    given_affine,
    output_error,
    refit,
    stored_parts,
    target_of,
    write,
)
from jlcm.learning.objective import Moments, Quadratic, quadratic
from jlcm.learning.options import Learn
from jlcm.learning.proximal import Samples, learn_by_gradient
from jlcm.learning.report import OnResult, collector, ignore, in_brief
from jlcm.learning.resume import read_part, restore_part, save_part, stage_folder, stored_buffers
from jlcm.learning.solver import improve, start
from jlcm.packed import PackedWeight
from jlcm.rotation import rotate
from jlcm.sensitivity import position_weights

#: Part of what held-out inputs call the best correction of earlier errors that is made: they judge
#: one layer, and what it corrects adds up over the layers.
RESTRAINT = 0.5


@dataclass(kw_only=True)
class LayerResult:
    """What learning did to one layer.

    Attributes:
        name: of the weight.
        before: squared output error on the held-out inputs over the output's variance, as given.
        after: the same for what was kept.
        kept: "initialisation", "statistics" (only norm or bias changed) or "learned".
        seconds: that it took.
        restored: whether it was read from the folder of an earlier run.
        note: why a layer was left as it was; empty otherwise.
        curve: training loss in the course of learning.
    """

    name: str
    before: float = float("nan")
    after: float = float("nan")
    kept: str = "initialisation"
    seconds: float = 0.0
    restored: bool = False
    note: str = ""
    curve: list[float] = field(default_factory=list)


@torch.no_grad()
def learn_layers(
    packed: nn.Module,
    reference: nn.Module,
    batches: Sequence[Tensor] | Tensor,
    *,
    options: Learn | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
    folder: Path | None = None,
    on_result: OnResult = ignore,
) -> list[LayerResult]:
    """Learn the packed weights of a network from calibration inputs, in place.

    Args:
        packed: returned by `jlcm.compress`.
        reference: the full-precision network with the same module names and order of neurons.
        batches: calibration inputs, tensors of (inputs, ...); no labels.
        options: of the learning.
        seed: of the sampling.
        device: where both networks run and stay.
        progress: show a progress bar.
        folder: where each finished layer is written, so that an interrupted run goes on from there,
            and runs that begin alike share what they have in common.
        on_result: called with each result as soon as there is one.

    Returns:
        One result for each packed weight, in forward order.

    Raises:
        ValueError: calibration set empty or too small, NaN or infinite activations, a network that
            is not compressed or does not match its reference, or damaged files in the folder.
    """
    options, device = options or Learn(), torch.device(device)
    _check(packed, reference)
    training = reference.training, packed.training
    store, inputs = dict(stored_tensors(packed)), split_inputs(batches, options.forward_batch)
    is_decoder = decoder_layers(reference) is not None
    stage = {"seed": seed, "device": device, "progress": progress}
    (results, finish), modules = collector(on_result), dict(reference.named_modules())
    with stage_folder(folder, f"{options!r} {seed}", stored_buffers(store), inputs) as finished:
        weights = None
        if options.weighting == "fisher" or (options.weighting == "auto" and is_decoder):
            names = {n.rpartition(".")[0] for n, s in store.items() if isinstance(s, PackedWeight)}
            weights = _position_weights(reference, names, inputs, finished, **stage)
        calibration = calibrate(
            packed,
            reference,
            inputs,
            forward_batch=options.forward_batch,
            memory=options.memory,
            positions=options.positions,
            held_out=options.held_out,
            seed=seed,
            device=device,
            folder=folder,
            flip=options.flip,
            precision=options.precision,
            weights=weights,
        )
        bar = tqdm(
            calibration.layers, desc="learn", unit="layer", disable=not progress, leave=False
        )
        for index, layer in enumerate(bar):
            target = target_of(layer, store, modules, device)
            path = None if finished is None else finished / f"{index:04d}.safetensors"
            if path is not None and path.exists():
                metadata = restore_part(path, stored_parts(target))
                target.weight.relative_error = float(metadata["relative_error"])
                result = LayerResult(**json.loads(metadata["result"]))
                finish(replace(result, restored=True))
                continue
            began = time.perf_counter()
            result = _learn_layer(calibration, index, target, options, seed)
            result.seconds = time.perf_counter() - began
            if path is not None:
                metadata = {"result": json.dumps(asdict(result))}
                metadata["relative_error"] = repr(target.weight.relative_error)
                save_part(path, stored_parts(target), metadata)
            finish(result)
            bar.set_postfix_str(in_brief(result))
    for name, note in calibration.skipped.items():
        finish(LayerResult(name=name, note=note))
    reference.train(training[0])
    packed.train(training[1])
    return results


def _position_weights(
    reference: nn.Module, names: set[str], inputs: list[Tensor], folder: Path | None, **stage: Any
) -> dict[str, Tensor]:
    """What each position of a layer's output counts, read from the folder if it is there."""
    path = None if folder is None else folder / "positions.safetensors"
    if path is not None and path.exists():
        return read_part(path)[1]
    home = next(reference.parameters()).device
    found = position_weights(reference, names, inputs, **stage)
    reference.to(home)
    if path is not None:
        save_part(path, found, {})
    return found


def _learn_layer(
    calibration: Calibration, index: int, target: Target, options: Learn, seed: int
) -> LayerResult:
    result = LayerResult(name=calibration.layers[index].name)
    try:
        train, held, columns = _collect(calibration, index, target, options)
    except NotImplementedError as error:
        result.note = str(error)
        return result
    given = unpack_factors(target.weight, target.original.shape[0])
    before = given_affine(target)
    result.before = result.after = output_error(held, given.weight(), before, target.reference)
    candidates = [("statistics", given)]
    if options.kind != "none":
        try:
            learned, result.curve = _fit(train, held, given, target, columns, options, seed + index)
            candidates.append(("learned", learned))
        except torch.linalg.LinAlgError as error:
            result.note = f"not learned: {error}"
    chosen = None
    for kept, factors in candidates:
        affine = refit(train, factors, target, options)
        bare = replace(factors, row_scale=None)
        error = output_error(held, bare.weight(), affine, target.reference)
        if error < result.after:
            result.after, result.kept, chosen = error, kept, (bare, affine)
    if chosen is None:
        result.note = result.note or "no better on the held-out inputs: left as it was"
        return result
    write(target, *chosen)
    return result


def _fit(
    train: Moments,
    held: Moments,
    factors: Factors,
    target: Target,
    columns: tuple[Tensor, Tensor] | None,
    options: Learn,
    seed: int,
) -> tuple[Factors, list[float]]:
    """Learn codes, codebooks and scales; returns them and the loss in the course of it."""
    # Where a shift follows, it takes up the mean of the output afterwards.
    centred = target.shift is not None and options.statistics != "none"
    scale = target.reference.scale
    given = given_affine(target)
    offset = torch.where(scale != 0, (given.shift - target.reference.shift) / scale, 0.0)
    problem, outside = (
        quadratic(m, centred=centred, offset=offset, weights=scale.square()) for m in (train, held)
    )
    curve: list[float] = []
    if options.kind == "lnq" or options.start == "least_squares":
        problem, damped, factors = _best_start(
            train, held, factors, target, problem, outside, options
        )
        rounds = options.rounds
        if rounds is None:
            rounds = 1 if factors.memory else 2
        factors, curve = improve(damped, factors, rounds=rounds, sweeps=options.sweeps)
    else:
        damped = problem.damped(target.original, options.damping[0])
    if options.kind == "lnq":
        return factors, curve
    samples = None
    if columns is not None:
        affine = refit(train, factors, target, options)
        scale = affine.scale if factors.row_scale is None else affine.scale / factors.row_scale
        samples = Samples(
            inputs=columns[0],
            targets=target.activation(columns[1]),
            scale=scale.float(),
            shift=affine.shift.float(),
            activation=target.activation,
        )
    factors, steps = learn_by_gradient(
        problem,
        factors,
        target.original,
        held=outside,
        damped=damped,
        samples=samples,
        options=options,
        seed=seed,
    )
    return factors, curve + steps


def _best_start(
    train: Moments,
    held: Moments,
    given: Factors,
    target: Target,
    problem: Quadratic,
    outside: Quadratic,
    options: Learn,
) -> tuple[Quadratic, Quadratic, Factors]:
    """The objective to aim at, the same with a ridge, and codes rounded by it.

    The held-out inputs tell how far the target may depart from the original weight to make up for
    the errors of earlier layers, and which ridge's rounding serves them best, from the least ridge
    upwards.
    """
    row_scale = options.row_scale and target.scale is not None
    least, best = float("inf"), None
    for damping in sorted(options.damping):
        damped = problem.damped(target.original, damping)
        goal, part = damped.minimiser(), options.correction
        if part is None:
            part = RESTRAINT * outside.line_minimum(target.original, goal)
        # The minimiser moves with the target, in proportion.
        goal = torch.lerp(target.original, goal, part)
        aim = problem.corrected(target.original, part)
        damped = aim.damped(target.original, damping)
        factors = start(damped, goal, given, row_scale=row_scale)
        affine = refit(train, factors, target, options)
        weight = replace(factors, row_scale=None).weight()
        error = output_error(held, weight, affine, target.reference)
        if best is not None and not error < least:
            break
        least, best = error, (aim, damped, factors)
    return best


def _collect(
    calibration: Calibration, index: int, target: Target, options: Learn
) -> tuple[Moments, Moments, tuple[Tensor, Tensor] | None]:
    """Sums over training and held-out inputs, and columns for a sampled objective."""
    groups, rows, n = target.original.shape
    train, held = (Moments.zeros(groups, rows, n, target.original.device) for _ in range(2))
    sampled = options.activation and target.activation is not None and options.kind != "none"
    room = options.memory // (16 * groups * (n + rows) * sum(map(len, calibration.inputs)))
    inputs, outputs = [], []
    for x, y, outside, weights in calibration.pairs(index):
        if x.shape[1:3] != (groups, n) or y.shape[1:3] != (groups, rows):
            raise NotImplementedError("its product does not have the shape of its weight")
        x, y = x.float(), y.float()
        if target.folded is not None:
            y = target.folded.scale.float()[..., None] * y + target.folded.shift.float()[..., None]
        for moments, part in ((train, ~outside), (held, outside)):
            if bool(part.any()):
                chosen = part.to(x.device)
                counts = None if weights is None else weights[chosen].flatten()
                moments.add(joined(x[chosen]), joined(y[chosen]), counts)
        if sampled:
            step = -(-x.shape[-1] // max(room, 1))
            inputs.append(joined(x[~outside.to(x.device), ..., ::step]))
            outputs.append(joined(y[~outside.to(y.device), ..., ::step]))
    train.check()
    held.check()
    if target.weight.rotated:
        train, held = train.rotated(), held.rotated()
        inputs = [rotate(x.mT).mT for x in inputs]
    if not sampled:
        return train, held, None
    scale, shift = target.reference.scale.float(), target.reference.shift.float()
    return (
        train,
        held,
        (
            torch.cat(inputs, -1),
            scale[..., None] * torch.cat(outputs, -1) + shift[..., None],
        ),
    )


def joined(columns: Tensor) -> Tensor:
    """(inputs, groups, n, positions) to (groups, n, inputs * positions)."""
    return columns.permute(1, 2, 0, 3).flatten(2)


def _check(packed: nn.Module, reference: nn.Module) -> None:
    store = dict(stored_tensors(packed))
    if not any(isinstance(held, PackedWeight) for held in store.values()):
        raise ValueError("the network has no packed weights: call jlcm.compress first")
    modules = dict(reference.named_modules())
    for name, held in store.items():
        if not isinstance(held, PackedWeight):
            continue
        owner, _, tensor = name.rpartition(".")
        original = getattr(modules.get(owner), tensor, None)
        if not isinstance(original, Tensor) or tuple(original.shape) != held.shape:
            raise ValueError(f"the reference network has no tensor {name!r} of shape {held.shape}")
