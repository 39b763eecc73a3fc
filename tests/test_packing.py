"""Bit packing against Python's arbitrary-precision integers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jlcm.packing import (
    order_bytes,
    order_width,
    pack,
    pack_order,
    packed_bytes,
    unpack,
    unpack_order,
)

widths = st.integers(1, 8)


def as_integer(stream: torch.Tensor) -> int:
    return int.from_bytes(bytes(stream.tolist()), "little")


@settings(deadline=None, max_examples=300)
@given(widths, st.data())
def test_codes_are_consecutive_bits_of_one_little_endian_number(bits, data):
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))
    stream = pack(torch.tensor(codes, dtype=torch.int64), bits)
    assert stream.dtype == torch.uint8
    assert as_integer(stream) == sum(code << (i * bits) for i, code in enumerate(codes))
    assert len(stream) == packed_bytes(len(codes), bits) == -(-len(codes) * bits // 8)
    assert unpack(stream, bits, len(codes)).tolist() == codes


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 15, 16, 17, 1000, 4099])
def test_round_trip_at_every_width_and_remainder(bits, count):
    generator = torch.Generator().manual_seed(count)
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        codes = torch.randint(2**bits, (count,), generator=generator).to(dtype)
        stream = pack(codes, bits)
        assert stream.numel() == -(-count * bits // 8)
        back = unpack(stream, bits, count)
        assert back.dtype == torch.uint8 and torch.equal(back.long(), codes.long())


@pytest.mark.parametrize("bits", range(1, 9))
def test_results_share_no_memory_with_the_arguments(bits):
    codes = torch.ones(24, dtype=torch.uint8)
    stream = pack(codes, bits)
    back = unpack(stream, bits, 24)
    codes.zero_()
    stream.zero_()
    assert back.eq(1).all()


def test_strided_codes():
    codes = torch.arange(64).view(8, 8).t()[3]
    assert unpack(pack(codes % 8, 3), 3, 8).tolist() == (codes % 8).tolist()


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_width_outside_one_to_eight_is_refused(bits):
    with pytest.raises(ValueError, match="1 to 8 bits"):
        pack(torch.zeros(3, dtype=torch.int64), bits)
    with pytest.raises(ValueError, match="1 to 8 bits"):
        unpack(torch.zeros(3, dtype=torch.uint8), bits, 1)


@given(widths, st.sampled_from([-1, 0]))
def test_codes_that_do_not_fit_are_refused(bits, kind):
    wrong = -1 if kind else 2**bits
    with pytest.raises(ValueError, match="codes must lie in"):
        pack(torch.tensor([0, wrong]), bits)


@given(widths, st.integers(0, 50), st.integers(-3, 3))
def test_stream_of_the_wrong_length_is_refused(bits, count, change):
    size = packed_bytes(count, bits) + change
    if size < 0 or not change:
        return
    with pytest.raises(ValueError, match=f"{count} codes of {bits} bits"):
        unpack(torch.zeros(size, dtype=torch.uint8), bits, count)


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(0, 10))
def test_order_takes_the_entropy_bound_of_fixed_width(count, seed):
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    width = (count - 1).bit_length()
    stream = pack_order(order)
    assert order_width(count) == width
    assert stream.numel() == order_bytes(count) == -(-count * width // 8)
    assert as_integer(stream) == sum(o << (i * width) for i, o in enumerate(order.tolist()))
    back = unpack_order(stream, count)
    assert back.dtype == torch.int64 and torch.equal(back, order)


@pytest.mark.parametrize("count", [0, 1, 2, 65_536, 65_537])
def test_order_at_the_edges(count):
    order = torch.arange(count).flip(0)
    assert torch.equal(unpack_order(pack_order(order), count), order)
