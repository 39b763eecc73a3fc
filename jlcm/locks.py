"""Work that several processes need is done by one of them, the others wait."""

import errno
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

_log = logging.getLogger(__name__)

#: Errors of file systems without locks, for instance NFS or Lustre where they are turned off.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
#: Seconds between two looks at a lock that another process holds.
_POLL = 0.5
_waited = 0.0


def seconds_waited() -> float:
    """Seconds that this process has spent waiting for others so far."""
    return _waited


@contextmanager
def once(path: Path, *, again: bool = False, lock: Path | None = None) -> Iterator[bool]:
    """Tell whether this process has to make a file; a process that comes later waits, then reads.

    Args:
        path: the file, written atomically by whoever makes it.
        again: make it although it is there, unless another process did so while this one waited.
        lock: what is locked meanwhile, None for the file alone.

    Yields:
        Whether the file has to be made. It is not locked where it is there already, so that it can
        be read from folders that cannot be written.

    Raises:
        OSError: the file is not there and its folder cannot be written.
    """
    before = _stamp(path)
    if before is not None and not again:
        yield False
        return
    with exclusive(lock or path):
        yield _stamp(path) == before


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Let one process at a time work on a file or folder; the others wait, and say so.

    The operating system holds the lock (flock on a hidden file beside the path), so it ends with
    the process, even when that is killed. Where the file system has no locks, a warning is logged
    and nobody waits.

    Raises:
        OSError: the hidden file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A marker file in place of a lock would outlive a process that is killed.
    lock = FileLock(path.with_name(f".{path.name}.lock"), fallback_to_soft=False)
    try:
        _acquire(lock, path)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _log.warning(
            "%s: this file system has no locks (%s), so two processes may do the same work",
            path,
            error.strerror,
        )
    try:
        yield
    finally:
        with suppress(OSError):  # while it is held: a waiting process then makes a new one
            Path(lock.lock_file).unlink()
        lock.release()


def _acquire(lock: FileLock, path: Path) -> None:
    global _waited
    try:
        lock.acquire(blocking=False)
    except Timeout:
        _log.info("waiting for another process that works on %s", path)
        start = time.perf_counter()
        lock.acquire(poll_interval=_POLL)
        _waited += time.perf_counter() - start


def _stamp(path: Path) -> tuple[int, int] | None:
    """What changes when a file is replaced, None where there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_ino
