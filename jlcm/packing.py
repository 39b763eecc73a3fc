"""Integers of 1 to 8 bits packed into bytes without gaps, and back.

Bit order: value i occupies bits i*b .. i*b + b - 1 of the byte stream, least significant bit first.
Eight values therefore fill exactly b bytes, so three bits really cost three bits. The last byte is
padded with zeros.
"""

import torch
from torch import Tensor


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` integers of `bits` bits occupy."""
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into bytes.

    Args:
        codes: (N,) integers in [0, 2**bits), any integer dtype.
        bits: 1 to 8.

    Returns:
        (ceil(N * bits / 8),) uint8.

    Raises:
        ValueError: for a width outside 1..8 or a code that does not fit.
    """
    _check_bits(bits)
    count = codes.numel()
    if count and not 0 <= int(codes.min()) <= int(codes.max()) < 2**bits:
        raise ValueError(f"codes must lie in [0, {2**bits}) to be packed into {bits} bits")
    if bits == 8:
        return codes.to(torch.uint8).clone()
    padded = torch.zeros(-(-count // 8) * 8, dtype=torch.uint8, device=codes.device)
    padded[:count] = codes.to(torch.uint8)
    words = torch.zeros(padded.numel() // 8, dtype=torch.int64, device=codes.device)
    for i, column in enumerate(padded.view(-1, 8).unbind(1)):
        words |= column.to(torch.int64) << (bits * i)
    stream = torch.empty(words.numel(), bits, dtype=torch.uint8, device=codes.device)
    for j in range(bits):
        stream[:, j] = (words >> (8 * j)) & 0xFF
    return stream.view(-1)[: packed_bytes(count, bits)].clone()


def unpack(stream: Tensor, bits: int, count: int) -> Tensor:
    """Unpack what `pack` wrote.

    Args:
        stream: (ceil(count * bits / 8),) uint8.
        bits: 1 to 8.
        count: number of codes.

    Returns:
        (count,) uint8.

    Raises:
        ValueError: for a width outside 1..8 or a stream of the wrong length.
    """
    _check_bits(bits)
    if stream.numel() != packed_bytes(count, bits):
        raise ValueError(
            f"{count} codes of {bits} bits take {packed_bytes(count, bits)} bytes, "
            f"the stream has {stream.numel()}"
        )
    if bits == 8:
        return stream.clone()
    if bits in (1, 2, 4):  # a byte holds a whole number of codes
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=stream.device)
        codes = (stream[:, None] >> shifts) & (2**bits - 1)
        return codes.view(-1)[:count]
    padded = stream
    if stream.numel() % bits:
        padded = stream.new_zeros(-(-stream.numel() // bits) * bits)
        padded[: stream.numel()] = stream
    words = torch.zeros(padded.numel() // bits, dtype=torch.int64, device=stream.device)
    for j, column in enumerate(padded.view(-1, bits).unbind(1)):
        words |= column.to(torch.int64) << (8 * j)
    codes = torch.empty(words.numel(), 8, dtype=torch.uint8, device=stream.device)
    for i in range(8):
        codes[:, i] = (words >> (bits * i)) & (2**bits - 1)
    return codes.view(-1)[:count]


def order_width(count: int) -> int:
    """Bits per entry of a stored permutation of `count` items: ceil(log2(count))."""
    return max(count - 1, 0).bit_length()


def order_bytes(count: int) -> int:
    """Bytes of a stored permutation of `count` items."""
    return packed_bytes(count, order_width(count))


def pack_order(order: Tensor) -> Tensor:
    """Pack a permutation, ceil(log2(n)) bits an entry.

    Args:
        order: (n,) int64, a permutation of 0..n-1.

    Returns:
        (ceil(n * ceil(log2 n) / 8),) uint8.
    """
    return pack_integers(order, order_width(order.numel()))


def unpack_order(stream: Tensor, count: int) -> Tensor:
    """Unpack what `pack_order` wrote into (count,) int64."""
    return unpack_integers(stream, order_width(count), count)


def pack_integers(values: Tensor, width: int) -> Tensor:
    """Pack (n,) int64 values in [0, 2**width), any width, into (ceil(n * width / 8),) uint8."""
    planes = torch.arange(width, device=values.device)
    return pack(((values[:, None] >> planes) & 1).reshape(-1), 1)


def unpack_integers(stream: Tensor, width: int, count: int) -> Tensor:
    """Unpack what `pack_integers` wrote into (count,) int64."""
    planes = torch.arange(width, device=stream.device)
    bits = unpack(stream, 1, count * width).view(count, width)
    return (bits.to(torch.int64) << planes).sum(1)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"codes have 1 to 8 bits, not {bits}")
