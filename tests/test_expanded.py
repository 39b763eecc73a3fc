"""Weights as sums: decoding, and sparse outliers with their gaps."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_packed import CASTS, check_cast

from jlcm.expanded import (
    ExpandedWeight,
    expand,
    gap_width,
    largest_outliers,
    outlier_bytes,
)
from jlcm.packed import PackedWeight, StoredWeight, nbytes
from jlcm.packing import pack
from jlcm.uniform import UniformWeight

ROWS, COLUMNS = 6, 20


def uniform(rows: int = ROWS, seed: int = 0, bits: int = 3, size: float = 1.0) -> UniformWeight:
    generator = torch.Generator().manual_seed(seed)
    return UniformWeight.encode(
        torch.randint(2**bits, (rows, COLUMNS), generator=generator),
        torch.rand(rows, generator=generator) * size,
        shape=(rows, 5, 2, 2),
        bits=bits,
    )


def codebooks() -> PackedWeight:
    generator = torch.Generator().manual_seed(0)
    return PackedWeight.encode(
        torch.randint(8, (ROWS * COLUMNS,), generator=generator),
        torch.randn(2, 8, generator=generator),
        shape=(ROWS, 5, 2, 2),
        bits=3,
        order=torch.randperm(ROWS, generator=generator),
    )


MASKS = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 0, 1, 0, 0, 0]]).bool()
POSITIONS = torch.tensor([0, 1, 63, 119])


def example(base: StoredWeight | None = None) -> ExpandedWeight:
    terms = [(m, uniform(int(m.sum()), 5 + i, size=0.01)) for i, m in enumerate(MASKS)]
    differences = torch.tensor([1.5, -2.0, 0.25, 3.0])
    base = uniform() if base is None else base
    return expand(base, terms=terms, positions=POSITIONS, differences=differences)


@pytest.mark.parametrize("base", [uniform, codebooks])
def test_decodes_as_the_sum_of_its_parts(base):
    stored = example(base())
    expected = base()().view(ROWS, COLUMNS).clone()
    for i, mask in enumerate(MASKS):
        term = uniform(int(mask.sum()), 5 + i, size=0.01)().view(-1, COLUMNS)
        for row, values in zip(mask.nonzero().view(-1), term, strict=True):
            expected[row] += values
    for position, value in zip(POSITIONS, (1.5, -2.0, 0.25, 3.0), strict=True):
        expected[position // COLUMNS, position % COLUMNS] += value
    assert torch.equal(stored(), expected.view(ROWS, 5, 2, 2))
    assert torch.equal(stored(), stored())  # the parts are left as they are
    assert sum(stored.sizes().values()) == sum(nbytes(buffer) for buffer in stored.buffers())
    books = 2 if base is codebooks else 0
    assert stored.groups() == (books, 4 + (0 if books else ROWS))
    assert (stored.order is None) == (base is uniform)


@pytest.mark.parametrize("cast", CASTS)
def test_casts_round_the_sum_once_and_change_no_stored_byte(cast):
    check_cast(example(), cast)


def test_narrow_base_keeps_small_terms():
    """A sum of parts in bfloat16 would lose terms below a 256th of the base."""
    base = uniform()
    base.dtype = torch.bfloat16
    stored = expand(base, terms=[(torch.ones(ROWS).bool(), uniform(seed=3, size=1e-3))])
    assert stored.dtype == torch.bfloat16
    expected = uniform()() + uniform(seed=3, size=1e-3)()
    assert torch.equal(stored(), expected.bfloat16())


def test_copy_and_state_dict_round_trip():
    stored = example()
    twin = copy.deepcopy(stored)
    assert torch.equal(twin(), stored())
    other = example(uniform(seed=9))
    assert not torch.equal(other(), stored())
    other.load_state_dict(stored.state_dict())
    assert torch.equal(other(), stored())
    twin.values.zero_()
    assert not torch.equal(twin(), stored())


def test_nothing_added_is_the_base():
    assert torch.equal(expand(uniform())(), uniform()())
    none = torch.empty(0, dtype=torch.int64)
    assert expand(uniform(), positions=none, differences=none.float()).values is None


def test_mask_bits_are_those_of_the_rows():
    assert torch.equal(example().masks, torch.stack([pack(m.int(), 1) for m in MASKS]))
    assert all(torch.equal(a, b) for a, b in zip(example().row_masks(), MASKS, strict=True))


# Outliers ----------------------------------------------------------------------------------------


def brute_force(positions: list[int]) -> dict[int, int]:
    """Entries at each width of a gap, walked one after the other."""
    entries = {}
    for width in range(1, 22):
        at, entries[width] = -1, 0
        for position in positions:
            while position - at - 1 >= 2**width:
                at += 2**width
                entries[width] += 1
            at = position
            entries[width] += 1
    return entries


def patterns() -> dict[str, tuple[int, list[int]]]:
    """Size of the weight, positions."""
    wide = 2**20
    return {
        "first": (wide, [0]),
        "last": (wide, [wide - 1]),
        "both ends": (wide, [0, wide - 1]),
        "dense": (300, list(range(300))),
        "dense after a gap": (1000, list(range(700, 1000))),
        "dense with one gap": (wide, [*range(200), *range(wide - 200, wide)]),
        "powers of two": (wide, [2**i for i in range(20)]),
        "before powers of two": (wide, [2**i - 1 for i in range(20)]),
        "equal gaps": (wide, list(range(0, wide, 4096))),
        "gaps of a width and one more": (wide, list(range(15, wide, 16 * 257))),
        "one value": (1, [0]),
    }


@pytest.mark.parametrize("pattern", patterns())
def test_gaps_of_every_pattern(pattern):
    count, chosen = patterns()[pattern]
    positions = torch.tensor(chosen)
    values = torch.arange(1, len(chosen) + 1).half()
    base = UniformWeight.encode(torch.zeros(count), torch.zeros(1), shape=(1, count), bits=1)
    stored = expand(base, positions=positions, differences=values.float())
    expected = torch.zeros(count)
    expected[positions] = values.float()
    assert torch.equal(stored().view(-1), expected)
    kept = stored.values != 0
    assert torch.equal(stored.positions()[kept], positions)
    assert torch.equal(stored.values[kept], values)
    entries = brute_force(chosen)
    smallest = min(2 * n + -(-n * width // 8) for width, n in entries.items())
    assert stored.sizes()["outliers"] == outlier_bytes(positions) == smallest
    assert stored.values.numel() == entries[stored.gap_bits]
    assert stored.gap_bits == gap_width(positions)


@settings(deadline=None, max_examples=150)
@given(st.sets(st.integers(0, 9999), min_size=1, max_size=60))
def test_gap_width_is_the_best(chosen):
    positions = torch.tensor(sorted(chosen))
    bits = {w: n * (16 + w) for w, n in brute_force(sorted(chosen)).items()}
    assert bits[gap_width(positions)] == min(bits.values())
    base = UniformWeight.encode(torch.zeros(10**4), torch.zeros(1), shape=(100, 100), bits=1)
    stored = expand(base, positions=positions, differences=positions + 1.0)
    assert torch.equal(stored().view(-1).nonzero().view(-1), positions)
    assert stored.sizes()["outliers"] == outlier_bytes(positions)


def test_no_outliers_take_no_bytes():
    none = torch.empty(0, dtype=torch.int64)
    assert outlier_bytes(none) == 0 and gap_width(none) == 1


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**16), st.integers(0, 700))
def test_largest_outliers_fill_the_budget(seed, budget):
    gains = torch.randn(20, 30, generator=torch.Generator().manual_seed(seed)).abs() ** 3
    (positions,) = largest_outliers([gains], budget)
    assert outlier_bytes(positions) <= budget
    assert torch.equal(positions, positions.unique())
    largest = gains.view(-1).argsort(descending=True)
    assert set(positions.tolist()) == set(largest[: len(positions)].tolist())
    more = largest[: len(positions) + 1].sort().values
    assert len(positions) == 600 or outlier_bytes(more) > budget


def test_outliers_are_shared_between_tensors():
    generator = torch.Generator().manual_seed(0)
    gains = [torch.randn(50, 40, generator=generator).abs() * size for size in (1.0, 3.0, 0.0)]
    chosen = largest_outliers(gains, 600)
    sizes = [outlier_bytes(positions) for positions in chosen]
    assert 590 <= sum(sizes) <= 600 and sizes[1] > sizes[0] and sizes[2] == 0
    inside = [g.view(-1)[p] for g, p in zip(gains, chosen, strict=True)]
    least = min(float(found.min()) for found in inside if found.numel())
    assert sum(int((g >= least).sum()) for g in gains) == sum(map(len, chosen))


def test_zeros_are_no_outliers():
    gains = torch.zeros(4, 4)
    assert largest_outliers([gains], 1000)[0].tolist() == []
    gains[2, 3] = 5
    assert largest_outliers([gains], 1000)[0].tolist() == [11]
    assert largest_outliers([gains], 2)[0].tolist() == [] and outlier_bytes(torch.tensor([0])) == 3


def test_outliers_beyond_float16_are_clipped():
    stored = expand(uniform(), positions=torch.tensor([3]), differences=torch.tensor([1e6]))
    assert stored.values.max() == 65504 and stored().isfinite().all()
