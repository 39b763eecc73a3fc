"""Compress a network, evaluate it packed, and record the result.

python run.py model=resnet18 init=hierarchical
python run.py -m model=resnet18 init=kmeans,hierarchical alpha=5.33,7.5
"""

import contextlib
import json
import os
import sys
import traceback
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.config import identity, register, run_id
from experiments.overrides import check_overrides, one_line

register()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> str | None:
    """Run one job; bad input ends in one line, the details with HYDRA_FULL_ERROR=1.

    Returns:
        In a sweep, what went wrong (`hydra_plugins.patient_sweeper`).
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        # Imported here, so that --help and a mistyped option need no PyTorch.
        from experiments.report import as_text
        from experiments.runner import run
        from experiments.tracking import open_tracker

        with open_tracker(
            OmegaConf.to_object(config.tracking),
            results_dir=Path(config.results_dir),
            run_id=run_id(config),
            group=HydraConfig.get().runtime.choices.get("experiment"),
            anew=config.force,
        ) as tracker:
            record = run(
                OmegaConf.to_object(config),
                run_id=run_id(config),
                identity=identity(config),
                folder=folder,
                tracker=tracker,
            )
    except Exception as error:
        with contextlib.suppress(OSError):  # leave nothing behind, unless there are results
            folder.rmdir()
        return _failed(error)
    print(json.dumps(record) if config.output == "json" else as_text(record), flush=True)


def _failed(error: Exception) -> str:
    """End a single run; in a sweep the others go on."""
    sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    expected = isinstance(error, ValueError | OSError)
    details = os.environ.get("HYDRA_FULL_ERROR") == "1" or not expected
    if details and not sweep:
        raise error
    if details:
        traceback.print_exception(error)
    if not sweep:
        sys.exit(one_line(error))
    kind = "" if expected else f"{type(error).__name__}: "
    print(one_line(error), file=sys.stderr, flush=True)
    return kind + one_line(error).removeprefix("error: ")


def write_tables(arguments: list[str]) -> None:
    """Write the table of a sweep; the records are safe whatever happens here."""
    if not any(argument.startswith("experiment=") for argument in arguments):
        return  # the process that launches others then needs no PyTorch
    from experiments.tables.make import after_sweep

    try:
        files = after_sweep(arguments)
    except (ValueError, OSError) as error:
        print(one_line(error), file=sys.stderr)
    else:
        print(*files, sep="\n", end="\n" if files else "")


if __name__ == "__main__":
    try:
        check_overrides(sys.argv[1:])
    except (ValueError, HydraException, OmegaConfBaseException) as error:
        sys.exit(one_line(error))
    try:
        main()
    finally:  # a sweep with failed cells has a table too
        write_tables(sys.argv[1:])
