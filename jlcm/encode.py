"""Cluster one weight matrix into codes, codebooks and scales within its bytes (Eq. 1, 2 and 4)."""

from functools import partial

import torch
from torch import Tensor

from jlcm import trellis
from jlcm.budget import Allocation, bytes_of, groups_for, memory_of
from jlcm.clustering.neurons import order_rows
from jlcm.clustering.scalar import cluster
from jlcm.config import Encoding, Init
from jlcm.packed import PackedWeight, group_sizes, tile_index
from jlcm.packing import order_bytes
from jlcm.rotation import rotate, rotate_squares


def kinds(encoding: Encoding) -> tuple[str, ...]:
    """The encodings to try: auto tries both of the paper."""
    return ("multi_scale", "multi_codebook") if encoding.kind == "auto" else (encoding.kind,)


def group_count(kind: str, allocation: Allocation, encoding: Encoding) -> int:
    """Groups that a tensor's bytes buy when no order is stored with it."""
    books, scales = groups_for(kind, allocation.spare, allocation, encoding.tile)
    return max(books, scales)


def neuron_order(matrix: Tensor, groups: int, kind: str, init: Init, seed: int) -> Tensor:
    """Order rows so that similar ones share a group (Eq. 4).

    Args:
        matrix: (n_o, n_i).
        groups: codebooks or scales of the tensor.
        kind: encoding. Rows are compared up to their norm unless each group has a scale, whose
            value the norm decides.
        init: clustering method and features.
        seed: of the clustering.

    Returns:
        (n_o,) int64; new row i is old row order[i].
    """
    return order_rows(
        matrix,
        clusters=min(groups, matrix.shape[0]),
        method=init.method,
        normalize=kind != "multi_scale",
        features=init.features,
        seed=seed,
    )


def encode(
    weight: Tensor,
    allocation: Allocation,
    encoding: Encoding,
    init: Init,
    *,
    importance: Tensor | None = None,
    rotated: bool = False,
    try_stored_order: bool = True,
    always_store_order: bool = False,
    seed: int = 0,
) -> PackedWeight:
    """Encode one weight.

    Several candidates (encodings under auto; with and without a stored row order) are compared at
    equal bytes by their squared error, weighted by the importance; the best is returned.

    Args:
        weight: any shape, rows first, finite.
        allocation: bits and bytes.
        encoding: kind, tile, scales.
        init: clustering.
        importance: of each weight, same shape, non-negative; None for equal.
        rotated: encode the rotated rows.
        try_stored_order: consider storing an order of the rows, where it is paid for.
        always_store_order: store it wherever it is paid for, better or not.
        seed: of the clustering.

    Returns:
        The packed weight, of `weight`'s floating dtype.
    """
    matrix = weight.detach().float().cpu().reshape(allocation.rows, -1)
    costs = None
    if importance is not None:
        # Scaled to 1, because squared gradients may be too small for float32.
        costs = importance.detach().double().cpu().reshape(matrix.shape)
        costs = (costs / costs.max().clamp(min=torch.finfo(torch.float64).tiny)).float()
    if rotated:
        matrix, costs = rotate(matrix), None if costs is None else rotate_squares(costs)
    candidates = []
    for kind in kinds(encoding):
        plain = groups_for(kind, allocation.spare, allocation, encoding.tile)
        spare = allocation.spare - order_bytes(allocation.rows)
        ordered = groups_for(kind, spare, allocation, encoding.tile)
        # An order changes something only where groups span rows, and must leave at least two.
        useful = 1 < max(ordered) < allocation.rows or (kind == "tiles" and allocation.rows > 1)
        stored = try_stored_order and useful and bytes_of(kind, *ordered, allocation) <= spare
        # The order comes second: it has to lower the error to be chosen.
        if not (stored and always_store_order):
            candidates.append((kind, *plain, None))
        if stored:
            order = neuron_order(matrix, max(ordered), kind, init, seed)
            candidates.append((kind, *ordered, order))
    memory = memory_of(encoding.kind, allocation)
    fit = partial(
        _fit,
        weight,
        matrix,
        bits=allocation.bits,
        encoding=encoding,
        init=init,
        importance=costs,
        rotated=rotated,
        seed=seed,
    )

    def squared(packed: PackedWeight) -> Tensor:
        return (packed.encoded_rows().to(weight.dtype).double() - matrix).square()

    def error(packed: PackedWeight) -> float:
        missed = squared(packed)
        return float((missed if costs is None else missed * costs).sum())

    chosen, best = candidates[0], None
    if len(candidates) > 1:  # without memory, which takes much longer and changes little here
        fitted = [fit(*candidate, memory=0) for candidate in candidates]
        errors = [error(packed) for packed in fitted]
        least = errors.index(min(errors))
        chosen, best = candidates[least], fitted[least]
    if best is None or memory:
        best = fit(*chosen, memory=memory)
    best.relative_error = relative_error(squared(best).sum(), matrix)
    return best


def relative_error(squared: Tensor, matrix: Tensor) -> float:
    """||error|| / ||matrix|| from the summed squared error; 0 for zeros kept exactly."""
    return float((squared / matrix.double().square().sum().clamp(min=1e-300)).sqrt())


def _fit(
    weight: Tensor,
    matrix: Tensor,
    kind: str,
    books: int,
    scale_count: int,
    order: Tensor | None,
    *,
    bits: int,
    memory: int,
    encoding: Encoding,
    init: Init,
    importance: Tensor | None,
    rotated: bool,
    seed: int,
) -> PackedWeight:
    """Encode with one candidate: kind, number of codebooks and scales, order or None."""
    flat = (matrix if order is None else matrix[order]).reshape(-1)
    if importance is not None:
        importance = (importance if order is None else importance[order]).reshape(-1)
    tile = encoding.tile if kind == "tiles" else None
    # The reference format is fp16, and 16-bit values have few distinct ones to cluster.
    values, scales = flat.half().float(), None
    if scale_count:
        sizes = group_sizes(flat.numel(), scale_count)
        scales = torch.segment_reduce(values.abs(), "max", lengths=sizes).half()
        per_weight = scales.float().repeat_interleave(sizes)
        values = torch.where(per_weight > 0, values / per_weight, 0.0)
    if memory:
        rows = (v if v is None else v.view(matrix.shape) for v in (values, importance))
        codebooks, codes = trellis.cluster(*rows, bits=bits, memory=memory, seed=seed)
    else:
        codebooks, codes = _cluster_groups(
            values, 2**bits, books, tile, matrix.shape, init, importance, seed
        )
    packed = PackedWeight.encode(
        codes.view(-1),
        codebooks,
        shape=tuple(weight.shape),
        bits=bits,
        scales=scales,
        order=order,
        tile=tile,
        rotated=rotated,
        memory=memory,
        dtype=weight.dtype,
    )
    if scales is not None and encoding.refit_scales:
        packed.scales = _least_squares_scales(flat, packed, importance)
    return packed


def _cluster_groups(values, k, books, tile, shape, init, importance, seed):
    """Cluster flat groups or tiles; codes come back in the order of `values`."""
    options = {"k": k, "method": init.method, "seed": seed}
    if tile is None:
        sizes = None if books == 1 else group_sizes(values.numel(), books)
        return cluster(values, sizes=sizes, importance=importance, **options)
    index = tile_index(*shape, tile).view(-1)
    by_tile = index.argsort(stable=True)
    codebooks, grouped = cluster(
        values[by_tile],
        sizes=index.bincount(minlength=books),
        importance=None if importance is None else importance[by_tile],
        **options,
    )
    return codebooks, torch.empty_like(grouped).index_copy_(0, by_tile, grouped)


def _least_squares_scales(flat: Tensor, packed: PackedWeight, importance: Tensor | None) -> Tensor:
    """(groups,) float16 scales that minimise each group's squared error."""
    sizes = group_sizes(flat.numel(), packed.scales.numel())
    codewords = packed.codeword_per_weight()
    cost = torch.ones_like(flat) if importance is None else importance
    cost = cost.double()  # small weights of small importance underflow in float32
    product = torch.segment_reduce(cost * flat * codewords, "sum", lengths=sizes)
    square = torch.segment_reduce(cost * codewords.square(), "sum", lengths=sizes)
    scales = torch.where(square > 0, product / square, packed.scales.double())
    return scales.clamp(-65504, 65504).half()


def encode_int8(weight: Tensor) -> PackedWeight:
    """Uniform symmetric 8-bit codes with one scale per row, the convention for the ends.

    A multi-scale encoding whose codebook is the grid -127/128..127/128: exact in float16, and with
    scales as large as the weights, where float16 is precise.
    """
    matrix = weight.detach().float().cpu().reshape(weight.shape[0], -1)
    scales = (matrix.abs().amax(1) * (128 / 127)).clamp(max=65504).half()
    step = scales.float()[:, None] / 128
    levels = torch.where(step > 0, (matrix / step).round().clamp(-127, 127), 0.0)
    return PackedWeight.encode(
        (levels + 127).to(torch.uint8).view(-1),
        torch.arange(-127, 128)[None] / 128,
        shape=tuple(weight.shape),
        bits=8,
        scales=scales,
        dtype=weight.dtype,
        relative_error=relative_error((levels * step - matrix).square().sum(), matrix),
    )
