"""Trellis-coded weights: a codeword is chosen by a weight's code together with those before it.

With m bits of memory the index of a weight's codeword is its own code of b bits below the last m
bits of the codes before it in the row (zeros at its start), so that a codebook of 2**(b + m)
codewords serves codes of b bits. Neighbours share bits, and not every sequence of codewords can be
written; the best one that can is found by dynamic programming (Viterbi). Normal values are served
with a third less squared error than by b bits alone from two bits on (trellis-coded quantisation:
Marcellin and Fischer, 1990; for language models Tseng et al., "QTIP: quantization with trellises
and incoherence processing", 2024, whose index is the same shift register).
"""

from functools import lru_cache

import torch
from torch import Tensor

#: Bits of an index into a codebook, of the code and the memory together, as far as bytes allow.
INDEX_BITS = 8
#: Rows of fewer values spend too many of their codes at the zeros before the row.
LEAST_COLUMNS = 16
#: Columns whose codes are decided at a time, and those after them that have a say in it.
DECIDED, AHEAD = 64, 24
#: Sequences at a time on a GPU.
_CHUNK = 2**16
#: Cost of what cannot be, far above that of what can.
_NEVER = 1e30
#: A codebook is clustered on so many values at the most, in so many rounds.
_SAMPLED, _ROUNDS = 2**15, 2
#: It starts from one for normal values: so many a codeword, in so many columns and rounds.
_NORMAL, _NORMAL_COLUMNS, _NORMAL_ROUNDS = 512, DECIDED + AHEAD, 60


def index_of(codes: Tensor, bits: int, memory: int) -> Tensor:
    """Index of each weight's codeword.

    Args:
        codes: (rows, n) uint8 below 2**bits.
        bits: of a code.
        memory: bits of the codes before it that count; without any the index is the code.

    Returns:
        (rows, n) int32.
    """
    if not memory:
        return codes.int()
    codes = codes if bits + memory <= 8 else codes.int()
    index = codes.clone()
    for back in range(1, reach(bits, memory) + 1):
        index[:, back:] |= codes[:, :-back] << (back * bits)
    return index.int() & (2 ** (bits + memory) - 1)


def reach(bits: int, memory: int) -> int:
    """How many weights after it a code has a say in."""
    return -(-memory // bits)


def best_path(
    values: Tensor,
    codebook: Tensor,
    *,
    memory: int,
    weights: Tensor | None = None,
    before: Tensor | None = None,
    after: Tensor | None = None,
) -> Tensor:
    """Indices of least weighted squared error among those that codes can write (Viterbi).

    Args:
        values: (n, sequences) float32, to be met by codewords.
        codebook: (2**(bits + memory),) float32.
        memory: bits of memory.
        weights: (n, sequences) non-negative, of the squared errors; None for equal ones.
        before: (sequences,) index of the value before the first; None for zeros.
        after: (k, sequences) codes that the last k values keep; None for none.

    Returns:
        (n, sequences) int64 indices.
    """
    if values.device.type == "cpu":
        from jlcm.trellis_kernel import best_path_on_cpu  # numba takes half a second to import

        return best_path_on_cpu(values, codebook, memory, weights, before, after)
    return best_path_of_tensors(values, codebook, memory, weights, before, after)


def best_path_of_tensors(
    values: Tensor,
    codebook: Tensor,
    memory: int,
    weights: Tensor | None,
    before: Tensor | None,
    after: Tensor | None,
) -> Tensor:
    """As `best_path`, all sequences at a time, which suits GPUs."""
    n, count = values.shape
    size, kept = codebook.numel(), 2**memory  # indices, and what the next one remembers of them
    codes = size // kept
    shift, device = codes.bit_length() - 1, values.device
    found = torch.empty(n, count, dtype=torch.int64, device=device)
    # (value - codeword)**2 less value**2, which is the same for all.
    basis = torch.stack([codebook.square(), -2 * codebook], 1)
    # Where the least cost comes from lies in its last bits: faster than to look for its place.
    forgotten = torch.arange(codes, dtype=torch.int32, device=device)[:, None, None]
    code = torch.arange(codes, device=device)[None, :, None]
    for start in range(0, count, _CHUNK):
        part = slice(start, start + _CHUNK)
        goal = values[:, part]
        weight = torch.ones_like(goal) if weights is None else weights[:, part]
        factors = torch.stack([weight, weight * goal], 1)
        chunk = goal.shape[1]
        cost = values.new_full((size, chunk), _NEVER)
        cost[0 if before is None else before[part], torch.arange(chunk, device=device)] = 0
        by_first, by_last = cost.view(codes, kept, chunk), cost.view(kept, codes, chunk)
        tagged = by_first.view(torch.int32)
        origins = torch.empty(n, kept, chunk, dtype=torch.int32, device=device)
        for t in range(n):
            tagged.bitwise_and_(~(codes - 1)).bitwise_or_(forgotten)
            least = by_first.amin(0)
            torch.bitwise_and(least.view(torch.int32), codes - 1, out=origins[t])
            torch.mm(basis, factors[t], out=cost)
            by_last.add_(least[:, None])
            if after is not None and t >= n - len(after):
                by_last.masked_fill_(code != after[t - n, part], _NEVER)
        index = cost.argmin(0)
        for t in reversed(range(n)):
            found[t, part] = index
            kept_bits = index >> shift
            index = origins[t].gather(0, kept_bits[None])[0] * kept + kept_bits
    return found


def quantise(values: Tensor, codebook: Tensor, memory: int, weights: Tensor | None) -> Tensor:
    """Indices for whole rows, decided some columns at a time.

    Args:
        values: (n, rows) float32.
        codebook: (2**(bits + memory),) float32.
        memory: bits of memory.
        weights: (n, rows) of the squared errors, None for equal ones.

    Returns:
        (n, rows) int64.
    """
    parts, before = [], None
    for start in range(0, len(values), DECIDED):
        part = slice(start, start + DECIDED + AHEAD)
        path = best_path(
            values[part],
            codebook,
            memory=memory,
            weights=None if weights is None else weights[part],
            before=before,
        )[:DECIDED]
        parts.append(path)
        before = path[-1]
    return torch.cat(parts)


def cluster(
    values: Tensor, importance: Tensor | None, *, bits: int, memory: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Find a codebook and codes: k-means in which sequences take the place of single values.

    Args:
        values: (rows, n) float32.
        importance: (rows, n) of the squared errors, None for equal ones.
        bits: of a code.
        memory: bits of memory.
        seed: of the sample that the codebook is clustered on.

    Returns:
        Codebook (1, 2**(bits + memory)) float32 and codes (rows, n) uint8.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, n = values.shape
    chosen = torch.randperm(rows, generator=generator)[: -(-_SAMPLED // n)]
    columns = values.T.contiguous()
    weights = None if importance is None else importance.T.contiguous()
    sample = columns[:, chosen].contiguous()
    counts = None if weights is None else weights[:, chosen].contiguous()
    # The same shares of the values lie below the codewords as of normal ones.
    shares = torch.special.ndtr(_normal_codebook(bits, memory))
    codebook = _refined(_quantiles(sample, shares), sample, memory, counts, _ROUNDS)
    codebook = codebook.half().float()  # as it is stored
    codes = quantise(columns, codebook, memory, weights) & (2**bits - 1)
    return codebook[None], codes.T.to(torch.uint8).contiguous()


@lru_cache
def _normal_codebook(bits: int, memory: int) -> Tensor:
    """(2**(bits + memory),) float32 codebook for normal values of variance 1, unordered.

    Rows in a rotated basis are nearly normal, and it takes many rounds to find codewords that go
    well together: of what 8 rounds leave at 3 bits, 60 on more values save a tenth.
    """
    size, generator = 2 ** (bits + memory), torch.Generator().manual_seed(0)
    # What is made in inference mode could not be used in training later.
    with torch.inference_mode(False), torch.device("cpu"):
        sequences = -(-_NORMAL * size // _NORMAL_COLUMNS)
        sample = torch.randn(_NORMAL_COLUMNS, sequences, generator=generator)
        # In random order: codewords that share a memory should lie far apart.
        shares = (torch.randperm(size, generator=generator) + 0.5) / size
        return _refined(_quantiles(sample, shares), sample, memory, None, _NORMAL_ROUNDS)


def _quantiles(values: Tensor, shares: Tensor) -> Tensor:
    """Values below which the given shares in [0, 1] of all values lie."""
    ascending = values.flatten().sort().values
    return ascending[(shares * len(ascending)).long().clamp(max=len(ascending) - 1)]


def _refined(
    codebook: Tensor, values: Tensor, memory: int, weights: Tensor | None, rounds: int
) -> Tensor:
    """Alternate the best sequences for values (n, rows) and the means of what a codeword serves."""
    size, counts = len(codebook), torch.ones_like(values) if weights is None else weights
    products = (counts * values).view(-1).double()
    counts = counts.view(-1).double()
    for _ in range(rounds):
        index = quantise(values, codebook, memory, weights).view(-1)
        mass = index.bincount(counts, minlength=size)
        total = index.bincount(products, minlength=size)
        codebook = torch.where(mass > 0, total / mass.clamp(min=1e-300), codebook.double()).float()
    return codebook
