"""Codes with memory for a layer's objective: sequences of them, some columns at a time.

What `solver` does code by code, where the codeword of a weight depends on its own code alone, is
done here for blocks of columns. Inside a block the columns' errors are taken as independent, which
rows in a rotated basis nearly make them (`jlcm.rotation`); what the block's errors do to all other
columns is exact.
"""

from dataclasses import replace

import torch
from torch import Tensor

from jlcm.learning.factors import Factors, by_column
from jlcm.learning.objective import Quadratic, inverse_factor
from jlcm.trellis import best_path, reach

#: Columns rounded before their errors are fed forward, and those after them that have a say.
DECIDED, AHEAD = 32, 16
#: Columns that are set anew at a time.
BLOCK = 32


def feedback_rounding(problem: Quadratic, target: Tensor, factors: Factors) -> Factors:
    """Round some columns at a time, their errors fed forward to the columns left.

    As Tseng et al. (QTIP, 2024) combine trellises with the feedback of GPTQ; here the sequences
    run along the rows, and columns further on have a say in the codes, too.

    Args:
        problem: with an invertible Gram matrix.
        target: (groups, rows, n) minimiser of the problem.
        factors: codebook and scales to use.
    """
    upper = inverse_factor(problem.gram)
    left, multiplier = by_column(target), by_column(factors.multiplier().expand(target.shape))
    divisor = torch.where(multiplier != 0, multiplier, 1.0)
    # What an error costs once the columns after it have made up for it as far as they can.
    curvature = by_column(1 / upper.diagonal(dim1=-2, dim2=-1)[:, None].square())
    weights = curvature * multiplier.square()
    codebook, n = factors.codebooks[0], len(left)
    found, before = torch.empty(left.shape, dtype=torch.int64, device=left.device), None
    for start in range(0, n, DECIDED):
        stop, seen = min(start + DECIDED, n), slice(start, start + DECIDED + AHEAD)
        path = best_path(
            (left[seen] / divisor[seen]).flatten(1),
            codebook,
            memory=factors.memory,
            weights=weights[seen].flatten(1),
            before=before,
        )[: stop - start]
        before = path[-1]
        found[start:stop] = path.view(found[start:stop].shape)
        errors = torch.empty_like(left[start:stop])
        for i in range(start, stop):
            rounded = codebook[found[i]] * multiplier[i]
            errors[i - start] = (left[i] - rounded) / upper[:, i, i, None]
            left[i + 1 : stop] -= upper[:, i, i + 1 : stop].T[..., None] * errors[i - start]
        rest = errors.permute(1, 2, 0) @ upper[:, start:stop, stop:]
        left[stop:] -= rest.permute(2, 0, 1)
    return replace(factors, codes=found.permute(1, 2, 0).contiguous())


def coordinate_descent(problem: Quadratic, factors: Factors, sweeps: int) -> Factors:
    """Set the codes of one block of columns after the other anew; never raises the loss of a row.

    Args:
        problem: with an invertible Gram matrix.
        factors: to start from.
        sweeps: passes over all columns; every other one starts half a block later.
    """
    bits = (factors.codebooks.shape[1] >> factors.memory).bit_length() - 1
    later, codebook = reach(bits, factors.memory), factors.codebooks[0]
    gram, n = problem.gram, factors.codes.shape[-1]
    multiplier = by_column(factors.multiplier().expand(factors.codes.shape))
    divisor = torch.where(multiplier != 0, multiplier, 1.0)
    weights = by_column(gram.diagonal(dim1=-2, dim2=-1)[:, None]) * multiplier.square()
    found, weight = by_column(factors.codes), by_column(factors.weight())
    for sweep in range(sweeps):
        # Half the gradient, computed afresh in each sweep so that rounding errors do not pile up.
        slope = by_column(weight.permute(1, 2, 0) @ gram - problem.cross)
        edges = [0, *range(BLOCK // 2 if sweep % 2 else BLOCK, n, BLOCK), n]
        for start, stop in zip(edges[:-1], edges[1:], strict=True):
            # The codewords of the next columns change too, though their codes stay.
            part = slice(start, min(stop + later, n))
            inner = gram[:, part, part]
            step = torch.linalg.solve(inner, slope[part].permute(1, 0, 2)).permute(1, 0, 2)
            path = best_path(
                ((weight[part] - step) / divisor[part]).flatten(1),
                codebook,
                memory=factors.memory,
                weights=weights[part].flatten(1),
                before=found[start - 1].flatten() if start else None,
                after=found[stop : part.stop].flatten(1) & (2**bits - 1),
            ).view(step.shape)
            change = codebook[path] * multiplier[part] - weight[part]
            pushed = torch.einsum("gij,jgr->igr", inner, change)
            gain = (change * (2 * slope[part] + pushed)).sum(0)
            # A tie or rounding noise is no reason to move.
            scale = (weights[part] * codebook.square().mean()).sum(0)
            better = gain < -1e-6 * scale
            change = torch.where(better, change, 0.0)
            found[part] = torch.where(better, path, found[part])
            weight[part] += change
            slope += torch.einsum("gij,igr->jgr", gram[:, part], change)
    return replace(factors, codes=found.permute(1, 2, 0).contiguous())
