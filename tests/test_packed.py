"""The packed tensor against a decoder written weight by weight from Eq. 1, 2 and 4."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jlcm.packed import PackedWeight, group_sizes, tile_grid, tile_index
from jlcm.packing import pack, packed_bytes


def decode(codes, codebooks, shape, *, scales=None, order=None, tile=None) -> torch.Tensor:
    """One weight after the other, in Python."""
    rows, count = shape[0], math.prod(shape)
    columns = count // rows
    decoded = torch.zeros(rows, columns)
    for p in range(count):
        row, column = divmod(p, columns)
        if tile is None:
            group = p * len(codebooks) // count
        else:
            group = row // tile[0] * -(-columns // tile[1]) + column // tile[1]
        value = float(codebooks[group][codes[p]])
        if scales is not None:
            value *= float(scales[p * len(scales) // count])
        decoded[row if order is None else order[row], column] = value
    return decoded.view(shape)


@st.composite
def parts(draw) -> dict:
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 12))
    count = rows * columns
    shape = draw(st.sampled_from([(rows, columns), (rows, columns, 1, 1), (rows, 1, columns)]))
    bits = draw(st.integers(1, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    tile = draw(st.none() | st.tuples(st.integers(1, 10), st.integers(1, 13)))
    groups = (
        draw(st.integers(1, count)) if tile is None else math.prod(tile_grid(rows, columns, tile))
    )
    codewords = draw(st.integers(1, 2**bits))
    scales = draw(st.none() | st.integers(1, count))
    return {
        "codes": torch.randint(codewords, (count,), generator=generator),
        "codebooks": torch.randn(groups, codewords, generator=generator).half().sort(1).values,
        "shape": shape,
        "bits": bits,
        "tile": tile,
        "scales": None if scales is None else torch.rand(scales, generator=generator).half(),
        "order": torch.randperm(rows, generator=generator) if draw(st.booleans()) else None,
    }


def example(**changes) -> PackedWeight:
    generator = torch.Generator().manual_seed(0)
    options = {
        "codes": torch.randint(8, (6 * 20,), generator=generator),
        "codebooks": torch.randn(4, 8, generator=generator),
        "shape": (6, 5, 2, 2),
        "bits": 3,
        "scales": torch.rand(9, generator=generator),
        "order": torch.randperm(6, generator=generator),
    }
    return PackedWeight.encode(**{**options, **changes})


@settings(deadline=None, max_examples=120)
@given(parts())
def test_decodes_as_the_equations_say(options):
    packed = PackedWeight.encode(**options)
    bits = options.pop("bits")
    expected = decode(**options)
    decoded = packed()
    assert decoded.dtype == torch.float32 and decoded.shape == options["shape"]
    # The product of two float16 numbers is exact in float32.
    assert torch.equal(decoded, expected)
    assert packed.codes.numel() == packed_bytes(packed.count, bits)
    assert torch.equal(packed.unpack_codes().long(), options["codes"])
    assert not packed().requires_grad and not list(packed.parameters())


@settings(deadline=None)
@given(st.integers(1, 500), st.data())
def test_flat_groups_are_floor_of_p_k_over_n(count, data):
    groups = data.draw(st.integers(1, count))
    sizes = group_sizes(count, groups)
    index = torch.arange(groups).repeat_interleave(sizes)
    assert index.tolist() == [p * groups // count for p in range(count)]
    assert sizes.min() >= 1 and sizes.max() - sizes.min() <= 1


def test_flat_groups_of_billions_of_weights_do_not_overflow():
    sizes = group_sizes(7 * 10**9, 12_345_678)
    assert int(sizes.sum()) == 7 * 10**9 and int(sizes.min()) >= 7 * 10**9 // 12_345_678


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 25), st.integers(1, 25))
@settings(deadline=None)
def test_tiles_cover_the_matrix_without_gaps(rows, columns, down, across):
    index = tile_index(rows, columns, (down, across))
    grid = tile_grid(rows, columns, (down, across))
    counts = index.view(-1).bincount()
    assert len(counts) == math.prod(grid) and int(counts.min()) >= 1
    assert int(counts.max()) <= down * across


CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "to": lambda m: m.to(torch.float16),
    "to device and dtype": lambda m: m.to("cpu", torch.float64),
    "type": lambda m: m.type(torch.float16),
    "channels last": lambda m: m.to(memory_format=torch.channels_last),
    "nested": lambda m: torch.nn.Sequential(m).half()[0],
}


def check_cast(stored, cast: str) -> None:
    """A cast changes the decoding dtype and no stored byte; `stored` is of float32."""
    before = {n: (b.dtype, b.clone()) for n, b in stored.named_buffers()}
    value = stored()
    stored = CASTS[cast](stored)
    assert (stored.dtype == torch.float32) == (cast == "channels last")
    assert stored().dtype == stored.dtype
    assert torch.equal(stored(), value.to(stored.dtype))
    for name, buffer in stored.named_buffers():
        assert buffer.dtype == before[name][0] and torch.equal(buffer, before[name][1])
    # Back in float32 nothing was lost.
    assert torch.equal(stored.float()(), value)


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("tile", [None, (2, 20)])
def test_casts_change_the_decoding_dtype_and_no_stored_byte(cast, tile):
    check_cast(example(tile=tile, codebooks=torch.randn(3 if tile else 4, 8)), cast)


def test_meta_device_moves_shapes_only():
    packed = example().to("meta")
    assert all(b.is_meta for b in packed.buffers()) and packed.codebooks.dtype == torch.float16


def test_copy_and_state_dict_round_trip():
    packed = example()
    twin = copy.deepcopy(packed)
    assert torch.equal(twin(), packed())
    other = example(codes=torch.zeros(120, dtype=torch.int64))
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other(), packed())
    twin.codebooks.zero_()
    assert packed().abs().sum() > 0


def test_every_decoding_is_a_new_tensor():
    packed = example(scales=None, order=None)
    packed().zero_()
    assert packed().abs().sum() > 0


def test_inference_mode_does_not_poison_later_decodings():
    packed = example()
    with torch.inference_mode():
        packed()
    x = torch.ones(6, requires_grad=True)
    (x[:, None, None, None] * packed()).sum().backward()
    assert x.grad is not None


WRONG = {
    "code without codeword": {"codes": torch.full((120,), 8)},
    "too many codewords": {"bits": 2},
    "too few codes": {"codes": torch.zeros(100, dtype=torch.int64)},
    "more codebooks than weights": {"codebooks": torch.zeros(121, 8)},
    "no codebook": {"codebooks": torch.zeros(0, 8)},
    "flat codebook": {"codebooks": torch.zeros(8)},
    "no scale": {"scales": torch.zeros(0)},
    "more scales than weights": {"scales": torch.zeros(121)},
    "order of another length": {"order": torch.randperm(20)},
    "codebooks that are not one a tile": {"tile": (2, 10)},
}


@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG)
def test_parts_that_do_not_fit_are_refused(changes):
    with pytest.raises(ValueError):
        example(**changes)


def test_missing_parts_are_refused():
    with pytest.raises(ValueError, match="codes and"):
        PackedWeight(shape=(2, 2), bits=1, codes=None, codebooks=torch.zeros(1, 2))
    with pytest.raises(ValueError, match="codes and"):
        PackedWeight(shape=(2, 2), bits=1, codes=pack(torch.zeros(4).int(), 1), codebooks=None)


def test_printing_shows_the_layout():
    text = repr(example())
    assert "shape=(6, 5, 2, 2)" in text and "bits=3" in text and "stored_order=True" in text
