"""Rotate the rows of a weight matrix by a fixed orthogonal matrix.

Trained weights have outliers and inputs of very different energy. In a rotated basis each value is
a sum over many of them: rows become nearly normal, so that few codewords serve them well, and the
energy of the inputs is even (incoherence processing: Chee et al., "QuIP: 2-bit quantization of
large language models with guarantees", 2023; Hadamard matrices: Tseng et al., "QuIP#", 2024). The
matrix follows from the number of columns alone, so nothing is stored.

With n = q p, p the greatest power of two in n, it is diag(signs) (D x H), D the cosine transform of
q points (the identity if q is above 256) and H the Hadamard matrix of p, itself the Kronecker
product of smaller ones, all of them orthogonal.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

#: Sums over fewer values are no nearer to normal: shorter rows (depthwise 3 x 3) stay as they are.
LEAST_COLUMNS = 16
#: Sizes of the matrices that the rotation is a product of, at most.
MOST_COSINES, MOST_HADAMARD = 256, 64


def rotate(matrix: Tensor) -> Tensor:
    """(..., n) times R, in the dtype given."""
    n = matrix.shape[-1]
    if n < LEAST_COLUMNS:
        return matrix
    return _apply(matrix * _signs(n, matrix.dtype, matrix.device), transposed=False)


def unrotate(matrix: Tensor) -> Tensor:
    """(..., n) times R^T: the inverse of `rotate`."""
    n = matrix.shape[-1]
    if n < LEAST_COLUMNS:
        return matrix
    return _apply(matrix, transposed=True) * _signs(n, matrix.dtype, matrix.device)


def rotate_squares(squares: Tensor) -> Tensor:
    """(..., n) times R * R elementwise: importance of squared errors in the rotated basis.

    What errors of two rotated values do together is left out, as it is before the rotation.
    """
    if squares.shape[-1] < LEAST_COLUMNS:
        return squares
    factors = _factors(squares.shape[-1], squares.dtype, squares.device)
    return _product(squares, [factor.square() for factor in factors])


def _apply(matrix: Tensor, *, transposed: bool) -> Tensor:
    factors = _factors(matrix.shape[-1], matrix.dtype, matrix.device)
    # Autocast would round the products to 16 bits.
    with torch.autocast(matrix.device.type, enabled=False):
        return _product(matrix, [f.mT for f in factors] if transposed else factors)


def _product(matrix: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """(..., n) times the Kronecker product of the factors, in blocks where it is smaller."""
    values, after = matrix, math.prod(map(len, factors))
    for factor in factors:
        size = len(factor)
        after //= size
        if after == 1:
            values = values.reshape(-1, size) @ factor
        else:
            values = factor.mT @ values.reshape(-1, size, after)
    return values.reshape(matrix.shape)


@lru_cache(maxsize=64)
def _factors(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Orthogonal matrices whose Kronecker product, block by block after diag(signs), is R."""
    power = n & -n
    odd, size = n // power, min(power, MOST_HADAMARD)
    odd = odd if odd <= MOST_COSINES else 1  # blocks
    # What is made in inference mode could not be used in training later.
    with torch.inference_mode(False), torch.device("cpu"):
        factors, rest = [_hadamard(size)], power // size
        # Few products of middling sizes are faster than many of small ones.
        while rest * odd > MOST_COSINES and rest > 1:
            size = min(rest, MOST_HADAMARD)
            factors, rest = [_hadamard(size), *factors], rest // size
        factors = [torch.kron(_cosines(odd), _hadamard(rest)), *factors]
        factors = [factor for factor in factors if len(factor) > 1]
        return tuple(factor.to(device, dtype) for factor in factors)


def _cosines(n: int) -> Tensor:
    """(n, n) orthonormal cosine transform (DCT-II)."""
    i = torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(math.pi / n * (i + 0.5) * i[:, None]) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix


def _hadamard(n: int) -> Tensor:
    """(n, n) orthonormal Hadamard matrix, n a power of two (Sylvester's)."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(n)


@lru_cache(maxsize=64)
def _signs(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(n,) fixed signs, by integer arithmetic so that they are the same everywhere."""
    with torch.inference_mode(False), torch.device("cpu"):
        i = torch.arange(1, n + 1)
        for _ in range(2):
            i = ((i ^ (i >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
        return (1 - 2 * (i >> 16 & 1)).to(device, dtype)
