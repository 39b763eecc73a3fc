"""Make a dashboard of tracked runs: a saved view of the project's W&B workspace.

python scripts/wandb_dashboard.py                           # needs an account: `wandb login`
python scripts/wandb_dashboard.py --offline dashboard.json  # its definition alone
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from experiments.config import Config, TrackingConfig
from experiments.overrides import one_line
from experiments.tracking import INSTALL, import_wandb
from jlcm.files import replacing

#: Columns of the table of runs.
COLUMNS = (
    "config:model.value.name", "config:method.value.name", "config:alpha.value",
    "summary:top1", "summary:top5", "summary:agreement", "summary:kl", "summary:original/top1",
    "summary:alpha_layers", "summary:alpha_total", "summary:file_bytes",
    "summary:seconds/compress", "summary:peak_rss_bytes",
)  # fmt: skip


def dashboard(entity: str, project: str) -> Any:
    """The workspace: accuracy against bytes, learning, seconds and memory, table of runs."""
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as workspaces

    def scatter(x: str, y: str, **options) -> panels.ScatterPlot:
        metrics = {"x": panels.SummaryMetric(x), "y": panels.SummaryMetric(y)}
        return panels.ScatterPlot(title=f"{y} against {x}", **metrics, **options)

    sections = {
        "Accuracy against bytes": [
            scatter("file_bytes", "top1", log_x=True),
            scatter("alpha_total", "top1"),
            scatter("file_bytes", "kl", log_x=True, log_y=True),
        ],
        "Learning": [
            panels.LinePlot(
                title="held-out error of each layer or block, before and after",
                x="learn/part",
                y=["learn/before", "learn/after"],
                log_y=True,
            ),
            panels.LinePlot(
                title="training loss within each layer or block",
                x="curve_step",
                metric_regex="curve/.*",
                log_y=True,
            ),
            panels.LinePlot(
                title="distillation",
                x="distill/epoch",
                y=["distill/training_loss", "distill/held_out_loss"],
                log_y=True,
            ),
        ],
        "Seconds and memory": [
            panels.BarPlot(title="seconds to compress", metrics=["seconds/compress"]),
            panels.BarPlot(title="seconds to evaluate", metrics=["seconds/evaluate_packed"]),
            panels.BarPlot(title="peak memory, bytes", metrics=["peak_rss_bytes"]),
            panels.LinePlot(title="seconds of each part", x="learn/part", y=["learn/seconds"]),
        ],
        "Table of runs": [
            panels.RunComparer(diff_only="split"),
            panels.WeavePanelSummaryTable(table_name="layers"),
        ],
    }
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name="Compression",
        sections=[
            workspaces.Section(name=name, panels=shown, is_open=True)
            for name, shown in sections.items()
        ],
        settings=workspaces.WorkspaceSettings(max_runs=100),
        runset_settings=workspaces.RunsetSettings(pinned_columns=list(COLUMNS)),
    )


def definition(workspace: Any) -> dict[str, Any]:
    """What the workspace is stored as on W&B."""
    return workspace._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)


def main() -> None:
    """Create the dashboard, or write its definition."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--project", default=TrackingConfig.project)
    parser.add_argument("--entity", help="user or team; default: the account's")
    parser.add_argument("--offline", type=Path, metavar="FILE", help="write the definition as JSON")
    options = parser.parse_args()
    try:
        wandb = import_wandb(Path(Config.results_dir).absolute() / "wandb", needed_by="this")
        import wandb_workspaces  # noqa: F401
    except ImportError as error:
        sys.exit(f"error: this needs {error.name}: {INSTALL}")
    except ValueError as error:
        sys.exit(one_line(error))
    if options.offline is None and wandb.login(prompt=False, verify=False):
        try:
            entity = options.entity or wandb.Api().default_entity
            print(dashboard(entity, options.project).save().url)
        except Exception as error:  # of the network, the account or W&B itself
            reason = " ".join(str(error).split())
            sys.exit(f"error: W&B: {reason}; --offline FILE writes the definition alone")
        return
    path = options.offline or Path("wandb_dashboard.json")
    workspace = dashboard(options.entity or "", options.project)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(definition(workspace), indent=1) + "\n")
    print(f"{path}: definition alone" + ("" if options.offline else ", no account (`wandb login`)"))


if __name__ == "__main__":
    main()
