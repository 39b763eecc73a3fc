"""From the one hyper-parameter alpha to bits and bytes of every tensor (Eq. 3).

Sizes are in bytes of the packed file. Eq. 3 counts codebooks exactly for several codebooks but
leaves the one codebook out for several scales; here everything that is stored is counted. Because
small tensors cannot pay for even one codebook from their own share, the budget is pooled over the
model: each tensor gets what it cannot do without, and the rest is shared in proportion to the
number of weights.
"""

import math
from dataclasses import dataclass, replace
from fractions import Fraction

import torch

from jlcm.config import Encoding, Invalid
from jlcm.packed import tile_grid
from jlcm.packing import packed_bytes
from jlcm.trellis import INDEX_BITS, LEAST_COLUMNS

HALF = 2  # bytes of a float16
MAX_BITS = 8
#: Row scales take at most this part of the bytes.
MOST_RESERVE = 20
#: A codebook with memory takes at most this part of its codes' bytes.
MOST_CODEBOOK = 64
#: Bytes are counted in so many steps where bits are shared out by sensitivity.
STEPS = 2**16


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """What one tensor may spend.

    Attributes:
        rows: n_o, output neurons.
        columns: n_i, weights of a row.
        bits: width of a code; a codebook has 2**bits codewords.
        nbytes: for codes, codebooks, scales and a stored order together.
    """

    rows: int
    columns: int
    bits: int
    nbytes: int = 0

    @property
    def count(self) -> int:
        """Number of weights."""
        return self.rows * self.columns

    @property
    def spare(self) -> int:
        """Bytes left for codebooks, scales and a stored order once the codes are paid."""
        return self.nbytes - packed_bytes(self.count, self.bits)


def code_bits(alpha: float) -> int:
    """Bits of a code: K = 2**floor(16 / alpha), at most 8 bits."""
    return min(math.floor(16 / alpha), MAX_BITS)


def goal_bytes(count: int, alpha: float) -> int:
    """Bytes that alpha leaves for so many weights."""
    # Exact: 132 bytes at alpha 8.8 leave 15, in floating point 14.
    return math.floor(HALF * count / Fraction(repr(float(alpha))))


def codebook_bytes(bits: int) -> int:
    """Bytes of one codebook of 2**bits float16 codewords."""
    return HALF * 2**bits


def memory_of(kind: str, allocation: Allocation) -> int:
    """Bits of memory (`jlcm.trellis`) of a tensor: as many as its bytes can pay a codebook for."""
    if kind != "trellis" or allocation.columns < LEAST_COLUMNS:
        return 0
    most = packed_bytes(allocation.count, allocation.bits) // MOST_CODEBOOK
    affordable = (most // HALF).bit_length() - 1
    return max(min(INDEX_BITS, affordable) - allocation.bits, 0)


def bytes_of(kind: str, codebooks: int, scales: int, allocation: Allocation) -> int:
    """Bytes of a tensor's float16 codebooks and scales."""
    width = allocation.bits + memory_of(kind, allocation)
    return codebooks * codebook_bytes(width) + scales * HALF


def groups_for(
    kind: str, spare: int, allocation: Allocation, tile: tuple[int, int]
) -> tuple[int, int]:
    """How many codebooks and scales `spare` bytes buy.

    Args:
        kind: an encoding other than auto.
        spare: bytes left after codes and, if there is one, the stored order.
        allocation: the tensor's sizes and bits.
        tile: of encoding tiles.

    Returns:
        (codebooks, scales). At least one codebook and, for multi_scale and trellis, one scale.
    """
    book = bytes_of(kind, 1, 0, allocation)
    match kind:
        case "multi_scale" | "trellis":
            return 1, min(max((spare - book) // HALF, 1), allocation.count)
        case "multi_codebook":
            return min(max(spare // book, 1), allocation.count), 0
        case "per_row":
            return allocation.rows, 0
        case "tiles":
            down, across = tile_grid(allocation.rows, allocation.columns, tile)
            return down * across, 0
    raise ValueError(f"no group counts for encoding {kind!r}")


def least_bytes(kind: str, allocation: Allocation, tile: tuple[int, int]) -> int:
    """The least a tensor can be packed into at its bits."""
    candidates = ("multi_scale", "multi_codebook") if kind == "auto" else (kind,)
    codes = packed_bytes(allocation.count, allocation.bits)
    counts = [groups_for(k, 0, allocation, tile) for k in candidates]
    pairs = zip(candidates, counts, strict=True)
    return codes + max(bytes_of(k, *count, allocation) for k, count in pairs)


def allocate(
    shapes: dict[str, tuple[int, int]],
    alpha: float,
    encoding: Encoding,
    distortions: dict[str, list[float]] | None = None,
    row_scales: set[str] = frozenset(),
) -> dict[str, Allocation]:
    """Share the bytes that `alpha` leaves.

    Args:
        shapes: (n_o, n_i) of every tensor, by name, in the order of the model.
        alpha: goal, fp16 bytes of these tensors over their packed bytes.
        encoding: kind, tile and budget rule.
        distortions: by name, the harm done by codes of 1, 2, ... bits. Bits are then chosen for
            each tensor so that the sum is small at the same bytes; None gives all the same bits.
        row_scales: names of the tensors that get a scale for each row first, where bits are
            chosen: no norm follows that could hold one.

    Returns:
        An allocation per tensor. The pooled budget's bytes together are at most the goal's.
        Where the codes at floor(16 / alpha) bits and one codebook each do not fit (16 / alpha an
        integer, or very small tensors), some tensors get fewer bits: as few tensors, and as small
        ones, as suffice, the first and the last tensor only when no other is left.

    Raises:
        Invalid: if no allocation reaches alpha; the message names the largest that is reached.
    """
    bits = code_bits(alpha)
    plans = {
        n: _sensible(Allocation(rows=r, columns=c, bits=bits), encoding)
        for n, (r, c) in shapes.items()
    }
    if encoding.budget == "per_layer":
        return {n: replace(p, nbytes=_printed_rule(p, alpha, encoding)) for n, p in plans.items()}
    total = sum(p.count for p in plans.values())
    budget = goal_bytes(total, alpha)
    reserve = {}
    if distortions is not None:
        if encoding.kind in ("multi_scale", "trellis"):  # which count one scale already
            reserve = {n: HALF * (plans[n].rows - 1) for n in plans if n in row_scales}
        most = budget // MOST_RESERVE
        if (wanted := sum(reserve.values())) > most:
            reserve = {n: nbytes * most // wanted for n, nbytes in reserve.items()}
        _share_bits(plans, budget - sum(reserve.values()), encoding, distortions)
    _demote_until_fits(plans, budget - sum(reserve.values()), alpha, encoding)
    least = {n: least_bytes(encoding.kind, p, encoding.tile) for n, p in plans.items()}
    rest = budget - sum(least.values()) - sum(reserve.values())
    spare = dict.fromkeys(plans, 0) | reserve
    # Scales beyond one for each row would lie across rows, so the rest goes to other tensors.
    free = [n for n in plans if n not in reserve] or list(plans)
    sharing = sum(plans[n].count for n in free)
    for n in free:
        spare[n] += rest * plans[n].count // sharing
    return {n: replace(p, nbytes=least[n] + spare[n]) for n, p in plans.items()}


def _share_bits(
    plans: dict[str, Allocation],
    budget: int,
    encoding: Encoding,
    distortions: dict[str, list[float]],
) -> None:
    """Give each tensor so many bits, from one, that the sum of the distortions is least.

    A knapsack, solved by dynamic programming over the bytes beyond one bit each.
    """
    for name, plan in plans.items():
        plans[name] = replace(plan, bits=1)
    first = {name: least_bytes(encoding.kind, plan, encoding.tile) for name, plan in plans.items()}
    if (left := budget - sum(first.values())) < 0:
        return
    step = max(left // STEPS, 1)
    places = left // step + 1
    best = torch.zeros(places, dtype=torch.float64)  # by the steps that are spent at the most
    found = []
    for name, plan in plans.items():
        sums = torch.full((len(distortions[name]), places), math.inf, dtype=torch.float64)
        prices = []
        for bits, harm in enumerate(distortions[name], start=1):
            least = least_bytes(encoding.kind, replace(plan, bits=bits), encoding.tile)
            prices.append(-(-(least - first[name]) // step))
            if prices[-1] < places:
                sums[bits - 1, prices[-1] :] = best[: places - prices[-1]] + harm
        best, chosen = sums.min(0)
        found.append((name, prices, chosen))
    place = places - 1
    for name, prices, chosen in reversed(found):
        index = int(chosen[place])
        plans[name] = replace(plans[name], bits=index + 1)
        place -= prices[index]


def _sensible(plan: Allocation, encoding: Encoding) -> Allocation:
    """Fewer bits for a tensor so small that its codebook outweighs its weights."""
    while plan.bits > 1 and least_bytes(encoding.kind, plan, encoding.tile) >= HALF * plan.count:
        plan = replace(plan, bits=plan.bits - 1)
    return plan


def _printed_rule(plan: Allocation, alpha: float, encoding: Encoding) -> int:
    """Bytes that Eq. 3 as printed gives one tensor: the multi-scale count ignores the codebook."""
    spare_bits = 16 * plan.count / alpha - plan.bits * plan.count
    spare = max(math.floor(spare_bits / 8), 0)
    if encoding.kind in ("multi_scale", "trellis", "auto"):
        spare += bytes_of(encoding.kind, 1, 0, plan)
    least = least_bytes(encoding.kind, plan, encoding.tile)
    return max(packed_bytes(plan.count, plan.bits) + spare, least)


def _demote_until_fits(
    plans: dict[str, Allocation], budget: int, alpha: float, encoding: Encoding
) -> None:
    def least(plan: Allocation) -> int:
        return least_bytes(encoding.kind, plan, encoding.tile)

    def saving(name: str) -> int:
        return least(plans[name]) - least(replace(plans[name], bits=plans[name].bits - 1))

    names = list(plans)
    inner, outer = names[1:-1], list(dict.fromkeys((names[0], names[-1])))
    while (missing := sum(least(p) for p in plans.values()) - budget) > 0:
        # Take a bit from tensors that still have the most, so that none falls far behind.
        for pool in (inner, outer):
            candidates = [n for n in pool if plans[n].bits > 1]
            if candidates:
                break
        else:
            reached = 2 * sum(p.count for p in plans.values()) / (budget + missing)
            raise Invalid(
                f"alpha={alpha:g} cannot be reached with encoding={encoding.kind}: one-bit "
                f"codes and the codebooks they need reach {math.floor(1000 * reached) / 1000:g}"
            )
        most = max(plans[n].bits for n in candidates)
        candidates = [n for n in candidates if plans[n].bits == most]
        enough = [n for n in candidates if saving(n) >= missing]
        chosen = min(enough, key=saving) if enough else max(candidates, key=saving)
        plans[chosen] = replace(plans[chosen], bits=plans[chosen].bits - 1)
