"""Measure the resident memory of a packed file: run by `jlcm.footprint.resident_bytes`."""

import ctypes
import gc
import sys

import psutil


def main(path: str) -> None:
    """Print the rise of the resident set size over `jlcm.load(path)`, in bytes.

    The file is loaded once before and let go, so that the pages of program code that loading
    touches for the first time are not counted as weights.
    """
    import jlcm

    jlcm.load(path)
    before = _resident()
    model = jlcm.load(path)
    print(_resident() - before)
    del model


def _resident() -> int:
    gc.collect()
    try:  # give back what the allocator keeps, so that only live memory counts
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except OSError:
        pass
    return psutil.Process().memory_info().rss


if __name__ == "__main__":
    main(sys.argv[1])
