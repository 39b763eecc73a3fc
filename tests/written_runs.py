"""Records as `run.py` leaves them, with results that a test chooses."""

from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose

from experiments.config import configurations, identity, run_id
from experiments.records import write_record

PARAMETERS = 1_000_000


@cache
def composed(overrides: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """Name and identity of a run, as `run.py` makes them."""
    with configurations():
        config = compose("config", overrides=list(overrides))
    return run_id(config), identity(config)


def write_run(
    results: Path,
    *overrides: str,
    top1: float = 90.0,
    kl: float = 0.1,
    file_bytes: int = 250_000,
    seconds: float = 2.0,
    memory: int = 10**9,
    original: float = 95.0,
    **parts: Any,
) -> Path:
    """Write the record of a run; returns its folder. `parts` replace parts of the record."""
    name, config = composed(overrides)
    record = {
        "run_id": name,
        "config": config,
        "original": {"top1": original, "top5": 99.0, "samples": 360},
        "packed": {
            "top1": top1,
            "top1_standard_error": 1.0,
            "top5": 99.0,
            "samples": 360,
            "agreement": top1,
            "kl": kl,
        },
        "footprint": {
            "file_bytes": file_bytes,
            "alpha_layers": 8.0,
            "alpha_total": 2 * PARAMETERS / file_bytes,
        },
        "layers": [],
        "learning": [],
        "seconds": {"compress": seconds},
        "peak_rss_bytes": memory,
        "notes": [],
    }
    folder = results / "runs" / name
    write_record(folder, record | parts)
    return folder
