"""Records: what a finished run leaves behind. A run is finished when its record exists."""

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

from jlcm.files import replacing

_log = logging.getLogger(__name__)

RECORD = "record.json"
PACKED_FILE = "packed.safetensors"
#: Pictures of the original pipeline, and of the packed one in a second row.
PICTURES = "pictures.png"
#: Folder of the records behind published tables.
PUBLISHED = "records"


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


def load_records(results_dir: Path) -> dict[str, dict[str, Any]]:
    """Records of all finished runs: those of `runs/`, and published ones that are not there.

    A damaged record is left out, with a warning that names it.

    Returns:
        Records by run_id, in the order of the names.
    """
    found = {}
    for path in (*results_dir.glob(f"runs/*/{RECORD}"), *results_dir.glob(f"{PUBLISHED}/*.json")):
        try:
            record = json.loads(path.read_text())
            found.setdefault(record["run_id"], record)
        except (ValueError, KeyError, TypeError) as error:
            _log.warning("%s is damaged (%s) and left out", path, error)
    return dict(sorted(found.items()))


def publish_record(results_dir: Path, record: dict[str, Any]) -> None:
    """Keep a record beside the tables that show it, without curves and without folders.

    Pictures of the run, if any, are kept beside it.
    """
    kept = {key: value for key, value in record.items() if key != "file"}
    kept["config"] = _names_only(record["config"])
    kept["learning"] = [
        {k: v for k, v in result.items() if k not in ("curve", "history")}
        for result in record.get("learning", ())
    ]
    with replacing(results_dir / PUBLISHED / f"{record['run_id']}.json") as temporary:
        temporary.write_text(json.dumps(kept, separators=(",", ":"), allow_nan=False) + "\n")
    pictures = results_dir / "runs" / record["run_id"] / PICTURES
    if pictures.is_file():
        with replacing(_published_pictures(results_dir, record["run_id"])) as temporary:
            shutil.copyfile(pictures, temporary)


def pictures_of(results_dir: Path, run_id: str) -> Path | None:
    """The pictures of a finished run, None where it has none."""
    places = results_dir / "runs" / run_id / PICTURES, _published_pictures(results_dir, run_id)
    return next((path for path in places if path.is_file()), None)


def _published_pictures(results_dir: Path, run_id: str) -> Path:
    return results_dir / PUBLISHED / f"{run_id}.png"


def _names_only(value: Any) -> Any:
    """A configuration with the names of files and folders in place of their paths."""
    match value:
        case dict():
            return {k: _names_only(v) for k, v in value.items()}
        case str() if "/" in value:
            return Path(value).name
    return value


def _finite(value: Any) -> Any:
    match value:
        case dict():
            return {k: _finite(v) for k, v in value.items()}
        case list() | tuple():
            return [_finite(v) for v in value]
        case float() if not math.isfinite(value):
            return None
    return value
