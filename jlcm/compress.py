"""The whole method: select -> budget -> re-order -> cluster and encode -> pack -> learn."""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from jlcm.budget import MAX_BITS, allocate, goal_bytes
from jlcm.config import (
    ALLOCATIONS,
    REORDERINGS,
    ROTATIONS,
    Encoding,
    Init,
    Invalid,
    check_alpha,
    check_choice,
)
from jlcm.decoder import decoder_groups, decoder_layers
from jlcm.encode import encode, encode_int8, group_count, kinds, neuron_order
from jlcm.fold import fold_batch_norms, norms_after_layers
from jlcm.layers import (
    WHEN_PACKED,
    HalfTensor,
    Stored,
    affine_of,
    is_static_norm,
    linearise,
    store,
    store_norm,
    stored_tensors,
    to_half,
)
from jlcm.learning.blocks import Blocks, learn_blocks
from jlcm.learning.distill import Distill
from jlcm.learning.distill import distill as run_distill
from jlcm.learning.options import Learn
from jlcm.learning.report import OnResult, ignore
from jlcm.learning.sequential import learn_layers
from jlcm.outliers import add_outliers
from jlcm.permutation import permute_slice
from jlcm.reorder import ReorderError, permutation_groups, permute
from jlcm.select import Filter, as_matrix, linear_and_convolution, select
from jlcm.sensitivity import distortions, fisher_information


@dataclass(kw_only=True)
class Compression:
    """What was done to a compressed model; kept on it as `model.compression` and in its file.

    Attributes:
        alpha: goal.
        reference_bytes: parameters and floating buffers of the original model at 2 bytes each.
        options: init, encoding, reorder, allocation, rotation, outliers and seed, or those of the
            compared method.
        notes: what was done otherwise than asked, one sentence each.
        relu: names of ReLU6 modules of the original that are plain ReLU in the compressed model.
        linear: names of transformers' Conv1D modules of the original that are Linear in it.
    """

    alpha: float
    reference_bytes: int
    options: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    relu: list[str] = field(default_factory=list)
    linear: list[str] = field(default_factory=list)


def compress(
    model: nn.Module,
    *,
    alpha: float = 7.5,
    init: str | Init = "hierarchical",
    encoding: str | Encoding = "multi_scale",
    reorder: str = "auto",
    filter_fn: Filter = linear_and_convolution,
    importance: dict[str, Tensor] | str | None = None,
    allocation: str = "uniform",
    rotation: str | None = None,
    outliers: float = 0.0,
    example_inputs: Any = None,
    calibration: Sequence[Tensor] | Tensor | None = None,
    learn: Learn | None = None,
    blocks: Blocks | None = None,
    distill: Distill | None = None,
    folder: Path | None = None,
    seed: int = 0,
    inplace: bool = False,
    device: str | torch.device = "cpu",
    progress: bool = True,
    on_result: OnResult = ignore,
) -> nn.Module:
    """Compress a network's weights into codebooks, without data or with unlabelled inputs.

    Equations and tables are those of Yvinec, Dapogny and Bailly, "Network Memory Footprint
    Compression Through Jointly Learnable Codebooks and Mappings".

    Args:
        model: any network; it is compressed for inference.
        alpha: goal, above 1 and at most 16: fp16 bytes of the chosen tensors over their packed
            bytes.
        init: clustering method ("random", "kmeans", "bisecting", "spectral" or "hierarchical"), or
            its options.
        encoding: kind of encoding ("multi_scale", "multi_codebook", "per_row", "tiles", "trellis"
            or "auto"), or its options.
        reorder: "auto" (propagate orders into the layers that follow where that is legal, and store
            an order elsewhere if it lowers the error at equal bytes), "propagated", "stored"
            (always store where the bytes allow) or "none".
        filter_fn: called with every submodule and its full name, true where the submodule's weight
            is to be compressed; default every Linear, Conv1d, Conv2d and MultiheadAttention.
        importance: non-negative weights of the squared errors (squared gradients, a diagonal
            Hessian), by full name of the tensor ("layer1.weight"), floating, of the tensor's shape;
            missing tensors count evenly. "fisher" estimates them on the calibration inputs.
        allocation: "uniform" (the same bits for all layers, Eq. 3) or "auto" (bits by sensitivity,
            the Fisher information on the calibration inputs, at the same bytes).
        rotation: "hadamard" (rows are encoded in a basis in which their values are nearly normal,
            `jlcm.rotation`, at the same bytes) or None.
        outliers: part of the bytes, at least 0 and below 1, for sparse 16-bit corrections of single
            weights, which are added before distillation.
        example_inputs: one batch (or tuple of arguments) that the network accepts, to trace where
            orders can be propagated; a few token ids (1, length) for a language model of
            transformers. Without it orders are only stored.
        calibration: unlabelled inputs as the network takes them, one tensor (n, ...) or a list of
            such batches, for `learn`, `blocks`, `distill`, `allocation="auto"` and
            `importance="fisher"`. For the last three the network must return logits,
            (n, ..., classes), or be a `jlcm.pipeline_network`.
        learn: learn codebooks and codes layer by layer (Eq. 5 to 9); None to leave it out.
        blocks: then tune block by block; None to leave it out.
        distill: then tune the network end to end; None to leave it out.
        folder: where learning keeps what is finished, so that an interrupted call goes on there;
            None to keep nothing. Calls with other options may share it: each finds only what it
            would compute itself.
        seed: of the clustering and the learning.
        inplace: use up `model` in place of a copy.
        device: where learning runs. The network stays there if layers or blocks are learned.
        progress: show a progress bar.
        on_result: called with the result of each layer and block and of each epoch of distillation
            as soon as there is one, also with those read from `folder`, in the same order.

    Returns:
        The compressed network, in evaluation mode. Its layers hold codes and decode when they run.
            Its attribute `compression` says what was done, and `learning` lists what learning did
            to each layer and block, then the result of distillation.

    Raises:
        Invalid: (a ValueError) for an option out of range, a goal that cannot be reached, or
            learning without calibration inputs.
        ValueError: no layer selected, NaN or Inf in a tensor, values beyond float16, a model that
            is already compressed, importance of a wrong name or shape, too few calibration inputs.
    """
    alpha = check_alpha(alpha)
    if not 0 <= outliers < 1:
        raise Invalid(f"outliers={outliers} must be a part of the bytes, at least 0 and below 1")
    dense_alpha = check_alpha(alpha / (1 - outliers))
    init = Init(method=init) if isinstance(init, str) else init
    encoding = Encoding(kind=encoding) if isinstance(encoding, str) else encoding
    check_choice("reorder", reorder, REORDERINGS)
    check_trellis(encoding, learn, blocks, distill)
    if reorder == "propagated" and example_inputs is None:
        raise Invalid("reorder=propagated needs example_inputs to trace the network with")
    check_choice("allocation", allocation, ALLOCATIONS)
    if rotation is not None:
        check_choice("rotation", rotation, ROTATIONS)
    if isinstance(importance, str):
        check_choice("importance", importance, ("fisher",))
    if allocation == "auto" and encoding.budget == "per_layer":
        raise Invalid("allocation=auto shares one budget: it needs encoding.budget=pooled")
    sensitive = allocation == "auto" or importance == "fisher"
    if sensitive and encoding.fold_bn:
        raise Invalid("allocation=auto and importance=fisher need encoding.fold_bn=false")
    if (learn or blocks or distill or sensitive) and calibration is None:
        raise Invalid(
            "learning, allocation=auto and importance=fisher need calibration inputs: pass "
            "calibration="
        )
    check_model(model)
    model = (model if inplace else copy.deepcopy(model)).eval()
    linear = linearise(model)
    select(model, filter_fn)
    summary = Compression(
        alpha=alpha,
        reference_bytes=reference_bytes(model),
        options={
            "init": asdict(init),
            "encoding": asdict(encoding),
            "reorder": reorder,
            "allocation": allocation,
            "outliers": outliers,
            "seed": seed,
        }
        | ({} if rotation is None else {"rotation": rotation}),
        linear=linear,
    )
    folded = fold_batch_norms(model) if encoding.fold_bn else set()
    weights = select(model, filter_fn)
    check_range(model, weights)
    fisher, home = None, next(model.parameters()).device
    stage = {"seed": seed, "device": device, "progress": progress}
    if importance == "fisher" or (allocation == "auto" and outliers):
        fisher = fisher_information(model, weights, calibration, **stage)
    importance = fisher if importance == "fisher" else _check_importance(importance, weights)

    ends = eight_bit_ends(weights, encoding.first_last)
    shapes = {n: tuple(as_matrix(w).shape) for n, w in weights.items() if n not in ends}
    harm, row_scales = None, set()
    if allocation == "auto":
        harm = distortions(
            model,
            {name: weights[name] for name in shapes},
            calibration,
            most_bits=MAX_BITS,
            learned=bool(learn),
            rotated=rotation is not None,
            fisher=fisher,
            folder=_part(folder, "allocation"),
            **stage,
        )
        row_scales = shapes.keys() - _followed_by_norm(model)
    model.to(home)
    allocations = allocate(shapes, dense_alpha, encoding, harm, row_scales) if shapes else {}
    if allocation == "uniform":
        most = max((a.bits for a in allocations.values()), default=0)
        for name, found in allocations.items():
            if found.bits != most:
                summary.notes.append(f"{name}: {found.bits}-bit codes, so that the goal is reached")

    propagated: set[str] = set()
    costs = [importance] + ([fisher] if fisher is not None and fisher is not importance else [])
    if reorder in ("auto", "propagated") and example_inputs is not None:
        try:
            propagated = _propagate(
                model, example_inputs, allocations, encoding, init, costs, seed, progress
            )
        except ReorderError as error:
            summary.notes.append(f"orders are not propagated: {error}")

    packed: dict[int, Stored] = {}
    bar = tqdm(weights.items(), desc="cluster", unit="layer", disable=not progress, leave=False)
    for name, weight in bar:
        if name in ends:
            packed[id(weight)] = encode_int8(weight)
            continue
        packed[id(weight)] = encode(
            weight,
            allocations[name],
            encoding,
            init,
            importance=importance.get(name),
            rotated=rotation is not None,
            try_stored_order=reorder in ("auto", "stored") and name not in propagated,
            always_store_order=reorder == "stored",
            seed=seed,
        )
    reference = copy.deepcopy(model) if learn or blocks or distill or outliers else None
    pack_model(model, packed, folded)
    model.compression, model.learning = summary, []
    stage["on_result"] = on_result
    if learn:
        layers = _part(folder, "layers")
        model.learning += learn_layers(
            model, reference, calibration, options=learn, folder=layers, **stage
        )
    if blocks:
        part = _part(folder, "blocks")
        model.learning += learn_blocks(
            model, reference, calibration, options=blocks, folder=part, **stage
        )
    if outliers:
        inner = [packed[id(weights[name])] for name in shapes]
        goal = goal_bytes(sum(held.count for held in inner), alpha)
        rest = goal - sum(sum(held.sizes().values()) for held in inner)
        add_outliers(model, reference, max(rest, 0), fisher or importance)
    if distill:
        end = _part(folder, "distill")
        model.learning.append(
            run_distill(model, reference, calibration, options=distill, folder=end, **stage)
        )
    return model


def _part(folder: Path | None, name: str) -> Path | None:
    return None if folder is None else Path(folder) / name


def reference_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and floating buffers at 16 bits: what alpha_total refers to."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(2 * t.numel() for t in tensors if t.is_floating_point())


def eight_bit_ends(weights: dict[str, nn.Parameter], first_last: str) -> set[str]:
    """Names of the weights that get 8 bits: the first and the last where `first_last` is int8."""
    return {next(iter(weights)), list(weights)[-1]} if first_last == "int8" else set()


def check_trellis(
    encoding: Encoding, learn: Learn | None, blocks: Blocks | None, distill: Distill | None
) -> None:
    """Refuse stages that move codes one by one, which a trellis does not allow.

    Raises:
        Invalid: (a ValueError) naming the option.
    """
    if encoding.kind != "trellis":
        return
    if learn is not None and learn.kind not in ("none", "lnq"):
        raise Invalid(
            f"learn={learn.kind} moves codes one by one, which encoding=trellis does not allow: "
            "take learn=lnq, or encoding=multi_scale"
        )
    for name, stage in (("blocks", blocks), ("distill", distill)):
        if stage is not None and stage.lr_codes:
            raise Invalid(
                f"{name} with lr_codes={stage.lr_codes} moves codes one by one, which "
                "encoding=trellis does not allow: set lr_codes=0, or encoding=multi_scale"
            )


def check_model(model: nn.Module) -> None:
    """Refuse a network that is compressed already, or whose tensors are not finite."""
    if hasattr(model, "compression") or next(stored_tensors(model), None):
        raise ValueError("the model is already compressed: start from the original network")
    if getattr(model, "hf_quantizer", None) is not None:
        method = model.hf_quantizer.quantization_config.quant_method
        raise ValueError(f"the model is already quantised ({method}): start from the original")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise ValueError(f"tensor {name!r} has no values (it is on the meta device)")
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"tensor {name!r} has NaN or Inf values: repair the checkpoint first")
    for name, buffer in model.named_buffers():  # masks may hold -Inf
        if buffer.is_floating_point() and buffer.isnan().any():
            raise ValueError(f"tensor {name!r} has NaN values: repair the checkpoint first")


def check_range(model: nn.Module, weights: dict[str, nn.Parameter]) -> None:
    """Refuse values that float16 cannot hold, before the long work."""
    chosen = {id(weight) for weight in weights.values()}
    for name, parameter in model.named_parameters():
        # Codebooks are float16 always, other tensors keep bfloat16.
        to_half(parameter.float() if id(parameter) in chosen else parameter, name)


def _check_importance(
    importance: dict[str, Tensor] | None, weights: dict[str, nn.Parameter]
) -> dict[str, Tensor]:
    for name, values in (importance or {}).items():
        if name not in weights:
            raise ValueError(f"importance is given for {name!r}, which is not a selected tensor")
        if values.shape != weights[name].shape:
            raise ValueError(
                f"importance of {name!r} has shape {tuple(values.shape)}, "
                f"the weight {tuple(weights[name].shape)}"
            )
        if not values.isfinite().all() or (values < 0).any():
            raise ValueError(f"importance of {name!r} is negative, NaN or Inf somewhere")
    return {name: values.clone() for name, values in (importance or {}).items()}


def _followed_by_norm(model: nn.Module) -> set[str]:
    """Names of the weights whose rows a batch norm scales."""
    try:
        return {f"{layer}.weight" for layer in norms_after_layers(model).values()}
    except ValueError:  # not traceable: no norm is known
        return set()


def _propagate(
    model, example_inputs, allocations, encoding, init, costs, seed, progress
) -> set[str]:
    """Re-order producers whose order can be moved into their consumers; names of the tensors."""
    kind, moved = kinds(encoding)[0], set()
    find = permutation_groups if decoder_layers(model) is None else decoder_groups
    groups = find(model, example_inputs)
    tensors = dict(model.named_parameters())
    for group in tqdm(groups, desc="re-order", unit="group", disable=not progress, leave=False):
        allocation = allocations.get(group.producer)
        count = group_count(kind, allocation, encoding) if allocation else 1
        if count == 1:
            continue
        rows = as_matrix(tensors[group.producer])[group.start : group.start + group.size]
        # A group of rows takes its share of the tensor's codebooks or scales.
        share = max(1, round(count * group.size / allocation.rows))
        order = neuron_order(rows.detach().float().cpu(), share, kind, init, seed)
        permute(model, group, order)
        for member in group.members:
            for cost in costs:
                if member.name in cost:
                    permute_slice(cost[member.name], member, order)
            if member.dim == 0:
                moved.add(member.name)
    return moved


def pack_model(model: nn.Module, packed: dict[int, Stored], folded: set[str]) -> None:
    """Replace every tensor of the model by its stored form."""
    halves: dict[int, Stored] = dict(packed)
    for name, module in list(model.named_modules()):
        if is_static_norm(module):
            affine = None
            if name not in folded:
                scale, shift = affine_of(module)
                affine = to_half(scale, f"{name}.weight"), to_half(shift, f"{name}.bias")
            store_norm(module, affine, dtype=module.running_mean.dtype)
            continue
        stored = {}
        own = module.named_parameters(recurse=False, remove_duplicate=False)
        for tensor_name, parameter in list(own):
            if id(parameter) not in halves:
                full_name = f"{name}.{tensor_name}" if name else tensor_name
                half = to_half(parameter, full_name)
                halves[id(parameter)] = HalfTensor(half, parameter.dtype)
            stored[tensor_name] = halves[id(parameter)]
        if stored:
            store(module, stored)
    for adapt in WHEN_PACKED:
        adapt(model)
