"""Records: what a finished run leaves behind. A run is finished when its record exists."""

import json
import math
from pathlib import Path
from typing import Any

from jlcm.files import replacing

RECORD = "record.json"
PACKED_FILE = "packed.safetensors"


def write_record(folder: Path, record: dict[str, Any]) -> Path:
    """Write a record atomically; NaN and Inf become null, which JSON has."""
    with replacing(folder / RECORD) as temporary:
        temporary.write_text(json.dumps(_finite(record), indent=1, allow_nan=False))
    return folder / RECORD


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a finished run, None where there is none.

    Raises:
        ValueError: if the record is not JSON.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}): delete it, or run with force=true"
        ) from error


def load_records(root: Path) -> list[dict[str, Any]]:
    """All records below a folder of runs, in the order of their names."""
    folders = sorted(path.parent for path in root.glob(f"*/{RECORD}"))
    return [read_record(folder) for folder in folders]


def _finite(value: Any) -> Any:
    match value:
        case dict():
            return {k: _finite(v) for k, v in value.items()}
        case list() | tuple():
            return [_finite(v) for v in value]
        case float() if not math.isfinite(value):
            return None
    return value
