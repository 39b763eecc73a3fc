"""The ablation benchmark: rows that exist, and means over seeds."""

import json
import math

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from benchmarks import ablation
from experiments.config import identity, register, run_id
from experiments.options import check_options, compressor, needs_calibration
from experiments.records import write_record


def composed(overrides, root):
    register()
    with initialize_config_dir(str(root / "conf"), version_base="1.3"):
        return compose("config", overrides=overrides)


def test_rows_are_valid_and_all_different(request):
    seen = {}
    for row, overrides in ablation.ROWS.items():
        raw = composed(overrides, request.config.rootpath)
        config = OmegaConf.to_object(raw)
        check_options(config)
        stages = compressor(config).keywords
        assert needs_calibration(config) == (row != "none")
        assert (stages["learn"] is None) == (row == "none")
        learn = json.dumps(identity(raw)["learn"], sort_keys=True)
        assert learn not in seen, f"{row} repeats {seen.get(learn)}"
        seen[learn] = row


@pytest.mark.parametrize("network", ablation.NETWORKS)
def test_networks_are_valid(network, request, tmp_path, monkeypatch):
    monkeypatch.setenv("JLCM_DATA", str(tmp_path))
    composed(ablation.network_overrides(network), request.config.rootpath)


def test_missing_data_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("JLCM_DATA", str(tmp_path / "nowhere"))
    assert ablation.network_overrides("resnet18_digits") == ["model=resnet18"]
    with pytest.raises(SystemExit, match="set JLCM_DATA"):
        ablation.network_overrides("efficientnet_lite0")


def record(row, top1, kl):
    return {
        "network": "net",
        "row": row,
        "alpha": 7.5,
        "original": {"top1": 90.0},
        "packed": {"samples": 100, "top1": top1, "agreement": top1, "kl": kl},
        "footprint": {"alpha_layers": 7.5, "file_bytes": 1000},
        "seconds": {"compress": 3.0},
        "learning": [
            {"name": "layer", "seconds": 4.0, "restored": True},
            {"name": "other", "seconds": 1.0, "restored": False},
            {"initial_loss": 1.0},
        ],
        "peak_rss_bytes": 5,
    }


def test_summary_is_mean_and_standard_deviation():
    records = [record("b", 80.0, 0.2), record("b", 84.0, 0.4), record("a", 70.0, 1.0)]
    table = ablation.summarise(records).set_index("row")
    assert list(table.index) == ["b", "a"]  # in the order of the rows, not of the alphabet
    assert table.loc["b", "seeds"] == 2
    assert table.loc["b", "top1"] == 82.0
    assert table.loc["b", "top1_std"] == pytest.approx(math.sqrt(8))
    assert table.loc["b", "kl"] == pytest.approx(0.3)
    assert table.loc["a", "seconds"] == 7.0  # what it took to learn the restored layer included
    assert math.isnan(table.loc["a", "kl_std"])  # one seed has no spread


def test_finished_runs_are_found_by_their_options(tmp_path, request):
    overrides = [*ablation.ROWS["proximal"], "alpha=5.33", "seed=1"]
    assert ablation.finished(overrides, tmp_path) is None
    raw = composed(overrides, request.config.rootpath)
    write_record(tmp_path / "runs" / run_id(raw), {"done": True})
    assert ablation.finished(overrides, tmp_path) == {"done": True}
    assert ablation.finished([*overrides, "seed=2"], tmp_path) is None


def test_failed_run_is_said(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="alpha"):
        ablation.run(["alpha=0.5"], tmp_path)
