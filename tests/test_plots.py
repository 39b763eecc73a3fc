"""Scripts that draw: what they draw, from the library's own gradients and records."""

import json
import subprocess
import sys

import pytest
import torch

from scripts.plot_learning import plot_learning
from scripts.plot_mapping_gradient import mapping_weights


def nearest_is_pulled_most(gaps, pull):
    """Whether, among larger codewords, the nearest one's logit rises most, weight by weight."""
    verdicts = []
    for distance, change in zip(gaps, pull, strict=True):
        larger = distance > 0
        if larger.sum() > 1:
            verdicts.append(bool(change[larger].argmax() == distance[larger].argmin()))
    return torch.tensor(verdicts)


def test_figure_1_chain_rule_pulls_far_and_proximal_near():
    gaps, chain = mapping_weights("joint", "corrected", "relative")
    _, proximal = mapping_weights("proximal", "corrected", "relative")
    _, printed = mapping_weights("proximal", "printed", "relative")
    assert nearest_is_pulled_most(gaps, proximal).all()
    assert not nearest_is_pulled_most(gaps, chain).any()
    assert torch.equal(printed, -proximal)
    assert (proximal[gaps > 0] > 0).all() and (proximal[gaps < 0] < 0).all()


def test_loss_curves_are_those_of_the_record():
    layers = [{"name": f"l{i}", "curve": [1.0 / (i + 1), 0.1]} for i in range(3)]
    figure = plot_learning({"learning": [*layers, {"name": "left", "curve": []}, {"history": []}]})
    drawn = [list(line.get_ydata()) for line in figure.axes[0].lines]
    assert drawn == [layer["curve"] for layer in layers]
    with pytest.raises(ValueError, match="no layer of this run was learned"):
        plot_learning({"learning": []})


def test_scripts_write_pictures(tmp_path, request):
    record = tmp_path / "record.json"
    record.write_text(json.dumps({"learning": [{"name": "a", "curve": [0.5, 0.2]}]}))
    for script, *arguments in (
        ("plot_mapping_gradient.py", tmp_path / "figure1.png"),
        ("plot_learning.py", record, tmp_path / "curves.png"),
    ):
        command = [sys.executable, f"scripts/{script}", *map(str, arguments)]
        subprocess.run(command, cwd=request.config.rootpath, check=True)
        assert arguments[-1].read_bytes().startswith(b"\x89PNG")
