"""How the process uses memory."""

import ctypes
import platform

#: glibc's names of its options (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_blocks() -> None:
    """Let glibc reuse freed blocks of up to 64 MB, and keep up to 512 MB of them.

    By default each tensor of some megabytes is mapped, zeroed page by page and unmapped again,
    which can take longer than what is computed with it: elementwise operations on 10 MB tensors
    take about half as long this way. Does nothing where the C library is another one.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 64 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 512 << 20)
