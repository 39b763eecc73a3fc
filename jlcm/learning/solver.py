"""Discrete least squares: codes by coordinate descent, codebooks and scales by least squares.

A weight is row_scale * scale * codebook[code]. With two of codes, codebooks and scales fixed, the
third is a linear least-squares problem, or, for the codes, a discrete one that sequential rounding
with error feedback (GPTQ, Frantar et al. 2023) starts and cyclic coordinate descent (LNQ, Kim et
al. 2025) improves. All rows are treated at once. Tensors are laid out as in `objective`: (groups,
rows, n), rows in the order of the weight, not of the packed one.
"""

from dataclasses import replace

import torch
from torch import Tensor

from jlcm.learning import viterbi
from jlcm.learning.factors import Factors, by_column
from jlcm.learning.objective import Quadratic, inverse_factor
from jlcm.trellis import quantise

#: Columns updated before their effect on all others is applied in one product.
BLOCK = 64
#: Steps of k-means with row scales; few where each is a search for sequences.
CLUSTER_STEPS, FEW_STEPS = 12, 2
#: Conjugate-gradient steps: a few more than the unknowns, or this many. Later rounds go on.
MOST_STEPS = 8


def nearest_codes(factors: Factors, values: Tensor, weights: Tensor | None = None) -> Tensor:
    """(groups, rows, n) int64 codes nearest to values already divided by the multiplier.

    With memory not each for itself: those of least squared error, times the weights, in a row.
    """
    codebooks, book = factors.codebooks, factors.book
    if factors.memory:
        columns = by_column(values).flatten(1)
        weights = None if weights is None else by_column(weights).flatten(1)
        found = quantise(columns, codebooks[0], factors.memory, weights)
        return found.T.contiguous().view(values.shape)
    if book is None:
        # Bucketing needs ascending codewords; least squares may have crossed two of them.
        ascending, order = codebooks[0].sort()
        codes = torch.bucketize(values.contiguous(), (ascending[1:] + ascending[:-1]) / 2)
        return codes if bool((order[1:] > order[:-1]).all()) else order[codes]
    best = torch.full_like(values, float("inf"))
    codes = torch.zeros_like(book)
    for code in range(codebooks.shape[1]):
        distance = (values - codebooks[:, code][book]).abs()
        closer = distance < best
        best = torch.where(closer, distance, best)
        codes = torch.where(closer, code, codes)
    return codes


class _Columns:
    """Factors laid out column by column, (n, groups, rows): the loops below go over columns.

    Places are indices into all codebooks written in a row, each ascending.
    """

    def __init__(self, factors: Factors) -> None:
        self.multiplier = by_column(factors.multiplier().expand(factors.codes.shape))
        self.divisor = torch.where(self.multiplier != 0, self.multiplier, 1.0)
        ascending, order = factors.codebooks.sort(1)
        self.ascending, self.order = ascending.view(-1), order.view(-1)
        count, k = ascending.shape
        first = k * torch.arange(count, device=order.device)[:, None]
        self.rank = (first + order.argsort(1)).view(-1)
        middle = (ascending[:, 1:] + ascending[:, :-1]) / 2
        self.edges, self.offset = middle[0], None
        if factors.book is not None:
            # All codebooks side by side on one axis, so that one search finds a codeword.
            self.low, self.high = float(ascending.min()), float(ascending.max())
            pitch = 2 * (self.high - self.low) + 1
            offset = pitch * torch.arange(count, dtype=torch.float64, device=order.device)
            last = middle.new_full((count, 1), (self.low + self.high + pitch) / 2)
            edges = torch.cat([middle, last], 1).double() + offset[:, None]
            self.edges, self.offset = edges.view(-1)[:-1], by_column(offset[factors.book])

    def nearest(self, values: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """Places nearest to values of one column (groups, rows), and the values they stand for."""
        scaled = values / self.divisor[column]
        if self.offset is not None:
            scaled = scaled.clamp(self.low, self.high) + self.offset[column]
        place = torch.bucketize(scaled, self.edges)
        return place, self.ascending[place] * self.multiplier[column]

    def places(self, factors: Factors) -> Tensor:
        """(n, groups, rows) places of the codes."""
        return self.rank[by_column(factors.entries())]

    def codes(self, places: Tensor) -> Tensor:
        """(groups, rows, n) codes from places."""
        return self.order[places].permute(1, 2, 0).contiguous()


def feedback_rounding(problem: Quadratic, target: Tensor, factors: Factors) -> Factors:
    """Round column by column, each rounding error fed forward to the columns left (GPTQ).

    With memory some columns at a time (`viterbi`).

    Args:
        problem: with an invertible Gram matrix.
        target: (groups, rows, n) minimiser of the problem.
        factors: codebooks and scales to use.
    """
    if factors.memory:
        return viterbi.feedback_rounding(problem, target, factors)
    gram = problem.gram
    # Columns of much energy first (GPTQ's "act-order"): later ones absorb their errors.
    order = gram.diagonal(dim1=-2, dim2=-1).mean(0).argsort(descending=True, stable=True)
    upper = inverse_factor(gram[:, order][:, :, order])
    left = by_column(target)[order]
    columns, sequence = _Columns(factors), order.tolist()
    found = torch.empty(left.shape, dtype=torch.int64, device=left.device)
    for start in range(0, len(sequence), BLOCK):
        stop = min(start + BLOCK, len(sequence))
        errors = torch.empty_like(left[start:stop])
        for i in range(start, stop):
            place, rounded = columns.nearest(left[i], sequence[i])
            error = (left[i] - rounded) / upper[:, i, i, None]
            found[sequence[i]], errors[i - start] = place, error
            left[i + 1 : stop] -= upper[:, i, i + 1 : stop].T[..., None] * error
        rest = errors.permute(1, 2, 0) @ upper[:, start:stop, stop:]
        left[stop:] -= rest.permute(2, 0, 1)
    return replace(factors, codes=columns.codes(found))


def coordinate_descent(problem: Quadratic, factors: Factors, sweeps: int) -> Factors:
    """Set each code to its best value with all others fixed, cyclically; never raises the loss.

    With memory codes of some columns at a time (`viterbi`).
    """
    if factors.memory:
        return viterbi.coordinate_descent(problem, factors, sweeps)
    gram, columns = problem.gram, _Columns(factors)
    diagonal = gram.diagonal(dim1=-2, dim2=-1).T[..., None]  # n, groups, 1
    inverse = torch.where(diagonal > 0, 1 / diagonal.clamp(min=1e-30), 0.0)
    weight = by_column(factors.weight())
    # A tie or rounding noise is no reason to move.
    margin = 1e-6 * columns.divisor.abs()
    found, n = columns.places(factors), len(weight)
    for _ in range(sweeps):
        # Half the gradient, computed afresh in each sweep so that rounding errors do not pile up.
        slope = by_column(weight.permute(1, 2, 0) @ gram - problem.cross)
        changed = False
        for start in range(0, n, BLOCK):
            stop = min(start + BLOCK, n)
            moves = torch.zeros_like(slope[start:stop])
            block = slope[start:stop].clone()
            for i in range(start, stop):
                best = weight[i] - block[i - start] * inverse[i]
                place, value = columns.nearest(best, i)
                move = (weight[i] - best).abs() - (value - best).abs() > margin[i]
                step = torch.where(move, value - weight[i], 0.0)
                found[i] = torch.where(move, place, found[i])
                weight[i] += step
                moves[i - start] = step
                block[i - start :] += gram[:, i, i:stop].T[..., None] * step
            if bool(moves.any()):
                changed = True
                slope += (moves.permute(1, 2, 0) @ gram[:, start:stop]).permute(2, 0, 1)
        if not changed:
            break
    return replace(factors, codes=columns.codes(found))


def least_squares_codebooks(problem: Quadratic, factors: Factors) -> Factors:
    """Codebooks that minimise the loss for given codes and scales; unused codewords stay."""
    books = factors.codebooks
    values = _least_squares(
        problem,
        factors.entries(),
        factors.multiplier().expand(factors.codes.shape),
        books.view(-1),
        iterations=min(books.numel() + 2, MOST_STEPS),
    )
    return replace(factors, codebooks=values.view_as(books))


def least_squares_scales(problem: Quadratic, factors: Factors) -> Factors:
    """Scales that minimise the loss for given codes and codebooks."""
    if factors.scales is None:
        return factors
    index = torch.zeros_like(factors.codes) if factors.scale is None else factors.scale
    factor = factors.codewords()
    if factors.row_scale is not None:
        factor = factor * factors.row_scale[..., None]
    steps = min(len(factors.scales) + 2, MOST_STEPS)
    scales = _least_squares(problem, index, factor, factors.scales, iterations=steps)
    return replace(factors, scales=scales)


def least_squares_rows(problem: Quadratic, factors: Factors) -> Factors:
    """Row scales that minimise the loss of each row; a row of zeros keeps its scale."""
    if factors.row_scale is None:
        return factors
    weight = replace(factors, row_scale=None).weight()
    square = ((weight @ problem.gram) * weight).sum(-1)
    product = (weight * problem.cross).sum(-1)
    fitted = torch.where(square > 0, product / square, factors.row_scale)
    return replace(factors, row_scale=torch.where(fitted != 0, fitted, factors.row_scale))


def _least_squares(
    problem: Quadratic, index: Tensor, factor: Tensor, start: Tensor, iterations: int
) -> Tensor:
    """Minimise the loss over v where the weight is factor * v[index], by conjugate gradients.

    It serves every layout of groups. A codebook of k entries is exact after k steps.
    """
    index = index.reshape(-1)
    rows = problem.weights[..., None]
    rows = rows / rows.mean().clamp(min=1e-30)

    def gather(values: Tensor) -> Tensor:
        return factor * values[index].view_as(factor)

    def scatter(gradient: Tensor) -> Tensor:
        summed = torch.zeros_like(start, dtype=torch.float64)
        return summed.index_add_(0, index, (factor * rows * gradient).double().view(-1))

    diagonal = problem.gram.diagonal(dim1=-2, dim2=-1)[:, None]
    curvature = scatter(factor * diagonal)
    used = curvature > 1e-12 * curvature.max().clamp(min=1e-30)
    inverse = torch.where(used, 1 / curvature, 0.0)
    values = start.double()
    residual = scatter(problem.cross - gather(start) @ problem.gram)
    direction = preconditioned = inverse * residual
    inner = first = float(residual @ preconditioned)
    for _ in range(iterations):
        if not inner > 1e-12 * max(first, 1e-300):
            break
        image = scatter(gather(direction.to(start.dtype)) @ problem.gram)
        bend = float(direction @ image)
        if bend <= 0:
            break
        step = inner / bend
        values = values + step * direction
        residual = residual - step * image
        preconditioned = inverse * residual
        previous, inner = inner, float(residual @ preconditioned)
        direction = preconditioned + inner / previous * direction
    return values.to(start.dtype)


def cluster_rows(problem: Quadratic, target: Tensor, factors: Factors) -> Factors:
    """Start again with a scale for each row: weighted k-means of the target's normalised rows.

    Every weight counts by its diagonal curvature. Scales of groups are normalised likewise, so all
    encodings are served.
    """
    diagonal = problem.gram.diagonal(dim1=-2, dim2=-1)[:, None]
    row_scale = (target.square().mean(-1)).sqrt()
    row_scale = torch.where(row_scale > 0, row_scale, 1.0)
    values = target / row_scale[..., None]
    scales = factors.scales
    if scales is not None:
        index = torch.zeros_like(factors.codes) if factors.scale is None else factors.scale
        scales = _group_rms(values, index.reshape(-1), scales.numel())
        values = values / scales[index]
    entries = factors.codebooks.shape
    index = torch.zeros_like(factors.codes) if factors.book is None else factors.book
    spread = _group_rms(factors.codewords(), index.reshape(-1), entries[0])
    wanted = _group_rms(values, index.reshape(-1), entries[0])
    factors = replace(
        factors,
        scales=scales,
        row_scale=row_scale,
        codebooks=factors.codebooks * (wanted / spread)[:, None],
    )
    importance = (diagonal * problem.weights[..., None] * factors.multiplier().square()).expand(
        target.shape
    )
    for _ in range(FEW_STEPS if factors.memory else CLUSTER_STEPS):
        factors = replace(factors, codes=nearest_codes(factors, values, importance))
        flat = factors.entries().view(-1)
        zeros = torch.zeros(entries.numel(), dtype=torch.float64, device=values.device)
        mass = zeros.index_add(0, flat, importance.double().reshape(-1))
        total = zeros.index_add(0, flat, (importance * values).double().reshape(-1))
        centres = torch.where(mass > 0, total / mass, factors.codebooks.double().view(-1))
        books = centres.float().view(entries)
        factors = replace(factors, codebooks=books if factors.memory else books.sort(1).values)
    return replace(factors, codes=nearest_codes(factors, values, importance))


def _group_rms(values: Tensor, index: Tensor, groups: int) -> Tensor:
    """(groups,) root mean square of each group, 1 where it is zero."""
    zeros = torch.zeros(groups, dtype=torch.float64, device=values.device)
    squares = zeros.index_add(0, index, values.double().square().reshape(-1))
    count = zeros.index_add(0, index, torch.ones_like(index, dtype=torch.float64))
    rms = (squares / count.clamp(min=1)).sqrt().float()
    return torch.where(rms > 0, rms, 1.0)


def start(problem: Quadratic, target: Tensor, factors: Factors, *, row_scale: bool) -> Factors:
    """Codes by rounding with error feedback.

    Args:
        problem: with an invertible Gram matrix (`Quadratic.damped`).
        target: (groups, rows, n) minimiser of the problem.
        factors: codebooks and scales to use; with `row_scale` only their layout counts.
        row_scale: cluster anew with a scale for each row.
    """
    if row_scale:
        factors = cluster_rows(problem, target, factors)
    return feedback_rounding(problem, target, factors)


def improve(
    problem: Quadratic, factors: Factors, *, rounds: int, sweeps: int
) -> tuple[Factors, list[float]]:
    """Alternate codes, row scales, codebooks and scales.

    Args:
        problem: with an invertible Gram matrix (`Quadratic.damped`).
        factors: to start from.
        rounds: outer rounds.
        sweeps: coordinate-descent sweeps in a round.

    Returns:
        The factors of least loss among the rounds, rounded, and the loss after each round.
    """
    best, least, curve = factors, float(problem.loss(factors.weight())), []
    for _ in range(rounds):
        factors = coordinate_descent(problem, factors, sweeps)
        factors = least_squares_rows(problem, factors)
        factors = least_squares_codebooks(problem, factors)
        factors = least_squares_scales(problem, factors)
        curve.append(float(problem.loss(factors.weight())))
        if curve[-1] < least:
            best, least = factors, curve[-1]
    return coordinate_descent(problem, best.rounded(), 1), curve
