"""Draw the figures from records, as PDF and PNG.

python scripts/make_figures.py
python scripts/make_figures.py pareto_top1 init --where model.name=resnet18 --output figures

What cannot be drawn says what it needs. The same results give the same files, byte for byte.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

try:
    import matplotlib  # noqa: F401
except ImportError:
    sys.exit("figures need matplotlib: python -m pip install -c constraints.txt -e '.[figures]'")

from experiments.config import TrackingConfig
from experiments.figures import CAPTIONS
from experiments.figures.choose import draw
from experiments.figures.style import save
from experiments.runs import read_runs, select
from experiments.tracking import MODES, open_tracker


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw what is asked for, say where it comes from and what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"{', '.join(CAPTIONS)} (default: all)"
    )
    parser.add_argument("--results-dir", type=Path, default=Path("results"))
    parser.add_argument("--output", type=Path, default=Path("results/figures"), help="folder")
    parser.add_argument(
        "--where",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="only runs with these options, for instance model.name=resnet18; or run_id=...",
    )
    parser.add_argument("--layer", help="of histogram and reorder (default: one in the middle)")
    parser.add_argument(
        "--formats", nargs="+", choices=("pdf", "png"), default=("pdf", "png"), metavar="FORMAT"
    )
    parser.add_argument(
        "--tracking", choices=MODES, default="off", help="log the figures to W&B, too, as one run"
    )
    arguments = parser.parse_args(arguments)
    for name in arguments.names:
        if name not in CAPTIONS:
            parser.error(f"no figure {name}: choose from {', '.join(CAPTIONS)}")
    if not arguments.results_dir.is_dir():
        parser.error(f"--results-dir {arguments.results_dir} does not exist")

    try:
        tracker = open_tracker(
            TrackingConfig(mode=arguments.tracking),
            results_dir=arguments.results_dir,
            run_id="figures",
        )
        runs = select(read_runs(arguments.results_dir), arguments.where)
    except ValueError as error:
        sys.exit(f"error: {error}")
    chosen = {condition.partition("=")[0] for condition in arguments.where}
    drawn, failed = {}, []
    for name in arguments.names or CAPTIONS:
        try:
            figure, source = draw(name, runs, chosen, arguments.layer)
            files = save(figure, arguments.output / name, tuple(arguments.formats))
        except (ValueError, OSError) as error:
            failed.append(name)
            print(f"{name}: not drawn: {error}", file=sys.stderr)
        else:
            drawn[name] = figure
            print(f"{name}: {', '.join(map(str, files))} (from {source})", flush=True)
    with tracker:
        tracker.start({}, job_type="figures")
        tracker.log_figures(drawn)
    if failed and (arguments.names or len(failed) == len(CAPTIONS)):
        sys.exit(1)


if __name__ == "__main__":
    main()
