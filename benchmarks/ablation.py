"""Ablation of learning: Table 4 and what goes beyond it, one network, several goals and seeds.

    python -m benchmarks.ablation resnet18_digits --output results/ablation_resnet18_digits.csv

Every cell is a run of `run.py` in a process of its own, so time and peak memory are its own too.
Finished runs are read from their records, so an interrupted benchmark goes on where it stopped.
Rows that begin with the same stage share it; its seconds count for each of them. The table is
written after each cell. All rows of a goal have the same bytes to within rounding.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from hydra import compose
from tqdm import tqdm

from experiments.config import configurations, run_id
from experiments.records import read_record
from experiments.runs import compression_seconds
from experiments.tables.cells import at

#: Eq. 5 to 9 by themselves: nothing re-estimated around them, no discrete solver afterwards.
_PLAIN = {"statistics": "none", "polish": "0", "final_least_squares": "false"}
#: Fewer and larger steps than the default: on ResNet-18 (digits, alpha 7.5) 60 such steps left the
#: same held-out errors of the layers as 100 default ones, and 100 such steps hardly less.
_STEPS = {"iterations": "60", "lr": "0.06", "lr_codebook": "0.006"}


def _added(options: dict[str, str]) -> list[str]:
    return [f"+learn.options.{key}={value}" for key, value in options.items()]


def _gradient(kind: str, **options: str) -> list[str]:
    return ["learn=joint", f"learn.kind={kind}", *_added(_STEPS | options)]


#: Overrides of each row.
ROWS: dict[str, list[str]] = {
    "none": ["learn=none"],
    "codebook": _gradient("codebook", **_PLAIN),
    "joint": _gradient("joint", **_PLAIN),
    "joint, soft forward, moment per element": _gradient(
        "joint", **_PLAIN, forward="soft", second_moment="per_element"
    ),
    "proximal": _gradient("proximal", **_PLAIN),
    "proximal, printed sign": _gradient("proximal", **_PLAIN, sign="printed"),
    "proximal, raw distance": _gradient("proximal", **_PLAIN, distance="raw"),
    "proximal, soft forward": _gradient("proximal", **_PLAIN, forward="soft"),
    "proximal, moment per element": _gradient("proximal", **_PLAIN, second_moment="per_element"),
    "paper": ["learn=paper", *_added(_STEPS)],
    "proximal + statistics": _gradient("proximal", polish="0", final_least_squares="false"),
    "proximal + statistics + polish": _gradient("proximal"),
    "lnq": ["learn=lnq"],
    "lnq + proximal": _gradient("proximal", start="least_squares"),
    "lnq + fisher importance": ["learn=lnq", "learn.importance=fisher"],
    "lnq + blocks": ["learn=blocks"],
    "lnq + distillation": ["learn=distill"],
    "lnq + rotation": ["learn=lnq", "learn.rotation=hadamard"],
    "lnq + allocation": ["learn=lnq", "learn.allocation=auto"],
    "default without rotation": ["learn.rotation=null"],
    "default": [],
}
#: Networks by name: overrides of `run.py`; {data} is the folder of JLCM_DATA.
NETWORKS: dict[str, list[str]] = {
    "resnet18_digits": ["model=resnet18"],
    "deit_digits": ["model=deit_tiny"],
    "resnet18_imagenette": [
        "model=resnet18",
        "model.weights={data}/weights/resnet18_imagenette128.safetensors",
        "data=imagenet",
        "data.root={data}/vision/imagenette144",
        "data.crop=128",
        "data.resize=144",
    ],
    "efficientnet_lite0": [
        "model=efficientnet_lite0",
        "data=image_list",
        "data.root={data}/vision/imagenet_like_1000",
        "data.list={data}/vision/imagenet_like_1000.tsv",
        "data.calibration_root={data}/vision/imagenet_train_1000",
        "data.calibration_list={data}/vision/imagenet_train_1000.tsv",
    ],
}
#: What is averaged over the seeds, and its place in the record.
MEASURES = {
    "original_top1": "original.top1",
    "top1": "packed.top1",
    "agreement": "packed.agreement",
    "kl": "packed.kl",
    "alpha_layers": "footprint.alpha_layers",
    "file_bytes": "footprint.file_bytes",
    "peak_rss_bytes": "peak_rss_bytes",
}


def main() -> None:
    """Run the missing cells, write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("network", choices=NETWORKS, help="those with {data} read $JLCM_DATA")
    parser.add_argument("--alpha", nargs="+", type=float, default=[5.33, 7.5])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--output", type=Path, help="CSV")
    parser.add_argument("--results-dir", type=Path, default=Path("results"))
    parser.add_argument("--overrides", nargs="*", default=[], help="for all runs")
    parser.add_argument(
        "--finished", action="store_true", help="run nothing, leave out what is missing"
    )
    arguments = parser.parse_args()
    base = network_overrides(arguments.network) + arguments.overrides
    cells = [
        (row, alpha, seed)
        for seed in arguments.seeds
        for alpha in arguments.alpha
        for row in arguments.rows
    ]
    records = []
    for row, alpha, seed in (bar := tqdm(cells, desc=arguments.network, unit="run")):
        bar.set_postfix_str(f"{row}, alpha {alpha:g}, seed {seed}")
        overrides = [*base, *ROWS[row], f"alpha={alpha:g}", f"seed={seed}"]
        record = finished(overrides, arguments.results_dir)
        if record is None and arguments.finished:
            continue
        record = record or run(overrides, arguments.results_dir)
        records.append({"network": arguments.network, "row": row, "alpha": alpha, **record})
        table = summarise(records)
        if arguments.output is not None:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            table.to_csv(arguments.output, index=False, float_format="%.6g")
    if not records:
        sys.exit("error: none of these runs is finished")
    print(table.to_string(index=False))


def network_overrides(name: str) -> list[str]:
    """Overrides of a network.

    Raises:
        SystemExit: the folder of its data does not exist.
    """
    data = Path(os.environ.get("JLCM_DATA", "../shared/data"))
    overrides = NETWORKS[name]
    if any("{data}" in text for text in overrides) and not data.is_dir():
        sys.exit(f"error: {name} reads images from {data}, which does not exist: set JLCM_DATA")
    return [text.format(data=data.resolve()) for text in overrides]


def finished(overrides: list[str], results_dir: Path) -> dict[str, Any] | None:
    """Record of a run that was done before, None if there is none."""
    with configurations():
        config = compose("config", overrides=overrides)
    return read_record(results_dir / "runs" / run_id(config))


def run(overrides: list[str], results_dir: Path) -> dict[str, Any]:
    """Record of a run, done in a process of its own.

    Raises:
        SystemExit: the run failed.
    """
    folders = [f"results_dir={results_dir}", f"stages_dir={results_dir / 'stages'}"]
    command = [sys.executable, "run.py", *overrides, *folders, "output=json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def summarise(records: list[dict[str, Any]]) -> pd.DataFrame:
    """One line per network, goal and row: mean over the seeds, and spread of accuracy and KL.

    Args:
        records: each with its `network`, `row` and `alpha`.
    """
    cells = pd.DataFrame(
        {
            "network": record["network"],
            "row": record["row"],
            "alpha": record["alpha"],
            "samples": record["packed"]["samples"],
            **{name: at(record, path) for name, path in MEASURES.items()},
            "seconds": compression_seconds(record),
        }
        for record in records
    )
    groups = cells.groupby(["network", "alpha", "row", "samples"], sort=False)
    table = groups.mean()
    table.insert(0, "seeds", groups.size())
    for name in ("top1", "kl"):
        spread = groups[name].std().rename(f"{name}_std")
        table.insert(table.columns.get_loc(name) + 1, f"{name}_std", spread)
    return table.reset_index().sort_values(["network", "alpha"], kind="stable")


if __name__ == "__main__":
    main()
