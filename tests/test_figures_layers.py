"""Figures of layers show what the records and packed files hold."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection
from torch import nn
from written_runs import write_run

import jlcm
from experiments.figures.choose import draw
from experiments.figures.layers import (
    group_boundaries,
    mapping_weights,
    plot_histogram,
    plot_layers,
    plot_learning,
    plot_mapping_gradient,
    plot_reorder,
)
from experiments.runs import read_runs
from jlcm.checkpoint import packed_weights
from jlcm.packed import PackedWeight, group_sizes
from jlcm.reading import read_tensors
from jlcm.uniform import UniformWeight

INPUTS = torch.randn(64, 24, generator=torch.Generator().manual_seed(2))


def network() -> nn.Module:
    """Rows of very different magnitudes in a random order, so that re-ordering them pays."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.mul_(torch.exp(2 * torch.randn(len(layer.weight), 1)))
    return model.eval()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A run without learning that stores orders, and the same learned."""
    root = tmp_path_factory.mktemp("results")
    common = {"alpha": 5.33, "reorder": "stored", "progress": False}
    overrides = ("alpha=5.33", "reorder=stored", "learn=lnq", "learn.allocation=uniform")
    learn = {"calibration": INPUTS, "learn": jlcm.Learn(kind="lnq")}
    for names, options in ((("method=jlcm_init",), {}), ((), learn)):
        model = jlcm.compress(network(), **common, **options)
        used = overrides[:2] if names else overrides
        layers = [asdict(layer) for layer in jlcm.footprint(model).layers]
        learning = [asdict(result) for result in model.learning]
        folder = write_run(root, *used, *names, layers=layers, learning=learning)
        jlcm.save(model, folder / "packed.safetensors")
    return root


def files(results):
    """Packed weights of both runs: without learning, then learned."""
    runs = read_runs(results)
    folders = runs.set_index("method")["folder"]
    return [
        packed_weights(*read_tensors(folders[method] / "packed.safetensors"))
        for method in ("jlcm_init", "jlcm")
    ]


def codeword_lines(panel):
    (found,) = (c for c in panel.collections if isinstance(c, LineCollection))
    assert all(segment[0, 0] == segment[1, 0] for segment in found.get_segments())
    return sorted(segment[0, 0] for segment in found.get_segments())


@pytest.mark.parametrize("name", ["0.weight", "2.weight"])
def test_histogram_has_the_weights_and_codebooks_of_both_files(name, results):
    figure, source = draw("histogram", read_runs(results), set(), layer=name)
    assert name in figure.get_suptitle()
    for panel, weights, when in zip(figure.axes, files(results), ("before", "after"), strict=True):
        weight = weights[name]
        assert panel.get_title(loc="left").startswith(f"{when} learning: {weight.bits} bits")
        assert codeword_lines(panel) == sorted(weight.codebooks.flatten().tolist())
        edges = [*(bar.get_x() for bar in panel.patches)]
        edges.append(panel.patches[-1].get_x() + panel.patches[-1].get_width())
        scale = weight.scale_per_weight().abs().median()
        counts = np.histogram(weight().flatten() / scale, np.array(edges))[0]
        drawn = [bar.get_height() * weight.count for bar in panel.patches]
        assert drawn == pytest.approx(counts)
        assert counts.sum() == weight.count


def test_codewords_of_many_codebooks_are_drawn():
    torch.manual_seed(0)
    codes, codebooks = torch.randint(8, (64 * 12,)), torch.randn(32, 8).sort(1).values
    weight = PackedWeight.encode(codes, codebooks, shape=(64, 12), bits=3)
    figure = plot_histogram(weight, weight, "many")
    expected = sorted(codebooks.half().float().flatten().tolist())
    assert codeword_lines(figure.axes[0]) == pytest.approx(expected)
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert sum(heights) == pytest.approx(1)


def test_heat_map_permutes_the_rows(results):
    figure, source = draw("reorder", read_runs(results), set(), layer="0.weight")
    weight = files(results)[1]["0.weight"]  # ours is preferred to its initialisation
    assert source.endswith(str(read_runs(results).set_index("method")["folder"]["jlcm"].name))
    original, ordered = (np.asarray(panel.images[0].get_array()) for panel in figure.axes[:2])
    order = weight.row_order()
    assert order.sort().values.tolist() == list(range(64)) and order.tolist() != list(range(64))
    assert np.array_equal(original, weight().abs().reshape(64, -1).numpy())
    assert np.array_equal(ordered, original[order.numpy()])
    (lines,) = (c for c in figure.axes[1].collections if isinstance(c, LineCollection))
    assert len(lines.get_segments()) == max(weight.groups()) - 1


@pytest.mark.parametrize("groups", [2, 5, 7, 12])
def test_boundaries_run_between_the_groups(groups):
    rows, columns = 12, 5
    weight = PackedWeight.encode(
        torch.zeros(rows * columns, dtype=torch.int64),
        torch.zeros(1, 2),
        shape=(rows, columns),
        bits=1,
        scales=torch.ones(groups),
    )
    owner = torch.arange(groups).repeat_interleave(group_sizes(rows * columns, groups))
    owner = owner.view(rows, columns)
    # Edges between two neighbours in a column belong to a line exactly if their groups differ.
    edges = set()
    for line in group_boundaries(weight):
        for (x0, y0), (x1, y1) in zip(line, line[1:], strict=False):
            if y0 == y1:
                edges |= {(x, y0) for x in range(x0, x1)}
    expected = {
        (column, row)
        for row in range(1, rows)
        for column in range(columns)
        if owner[row, column] != owner[row - 1, column]
    }
    inside = {(x, y) for x, y in edges if 0 < y < rows}
    assert inside == expected


def test_layers_have_the_errors_and_bytes_of_the_record(results):
    runs = read_runs(results).set_index("method")
    for method in ("jlcm_init", "jlcm"):
        figure, _ = draw("layers", runs.loc[[method]].reset_index(), set())
        record_layers = jlcm.footprint(runs.loc[method, "folder"] / "packed.safetensors").layers
        sizes = {line.get_label(): list(line.get_ydata()) for line in figure.axes[-1].lines}
        assert sizes["packed"] == [layer.nbytes for layer in record_layers]
        assert sizes["original, fp16"] == [2 * 64 * 24, 2 * 32 * 64]
        names = [text.get_text() for text in figure.axes[-1].get_xticklabels()]
        assert names == ["0", "2"]
        if method == "jlcm_init":
            (line,) = figure.axes[0].lines
            expected = [layer.relative_error for layer in record_layers]
            assert list(line.get_ydata()) == pytest.approx(expected, rel=1e-4)


def test_layers_have_the_held_out_errors():
    layers = [
        {"name": name, "shape": [4, 4], "nbytes": 9, "relative_error": error}
        for name, error in (("a", None), ("b", 0.25), ("c", None))
    ]
    learning = [
        {"name": "a", "kept": "learned", "before": 0.5, "after": 0.25},
        {"name": "c", "kept": "initialisation", "before": 0.125, "after": 0.125},
        {"name": "a .. c", "before": 0.5, "after": 0.5, "best_epoch": 1},
        {"initial_loss": 1.0, "final_loss": 0.5},
    ]
    weights, outputs, _ = plot_layers({"layers": layers, "learning": learning}).axes
    assert [line.get_xydata().tolist() for line in weights.lines] == [[[1, 0.25]]]
    assert {line.get_label(): line.get_xydata().tolist() for line in outputs.lines} == {
        "before learning": [[0, 0.5], [2, 0.125]],
        "after learning": [[0, 0.25], [2, 0.125]],
    }
    with pytest.raises(ValueError, match="no layer of the run has an error"):
        plot_layers({"layers": layers[:1], "learning": []})


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
    drawn = [panel.collections[0].get_offsets() for panel in plot_mapping_gradient().axes]
    for points, pull in zip(drawn, (chain, printed, proximal), strict=True):
        expected = torch.stack([gaps.flatten(), pull.flatten()], 1).numpy()
        assert np.allclose(np.asarray(points), expected)


def test_loss_curves_are_those_of_the_record():
    layers = [{"name": f"l{i}", "curve": [1.0 / (i + 1), 0.1]} for i in range(3)]
    figure = plot_learning({"learning": [*layers, {"name": "left", "curve": []}, {"history": []}]})
    drawn = [list(line.get_ydata()) for line in figure.axes[0].lines]
    assert drawn == [layer["curve"] for layer in layers]
    with pytest.raises(ValueError, match="no layer of this run was learned"):
        plot_learning({"learning": []})


def test_loss_curves_are_of_the_run_with_the_most_steps(tmp_path):
    for seed, steps in enumerate((2, 9, 5)):
        curve = [1.0 / (step + 1) for step in range(steps)]
        write_run(tmp_path, f"seed={seed}", learning=[{"name": "a", "curve": curve}])
    figure, _ = draw("learning", read_runs(tmp_path), set())
    assert len(figure.axes[0].lines[0].get_ydata()) == 9


def test_what_has_no_codebook_or_order_says_so(results):
    codes = torch.zeros(16, dtype=torch.int64)
    uniform = UniformWeight.encode(codes, torch.ones(4), shape=(4, 4), bits=2)
    packed = files(results)[0]["0.weight"]
    with pytest.raises(ValueError, match=r"some\.weight has no codebook"):
        plot_histogram(packed, uniform, "some.weight")
    with pytest.raises(ValueError, match=r"no order of rows is stored with some\.weight"):
        plot_reorder(uniform, "some.weight")


def test_missing_runs_files_and_layers_are_said(results, tmp_path):
    runs = read_runs(results)
    with pytest.raises(ValueError, match="no layer with codebooks is called 1: 0.weight, 2.weight"):
        draw("histogram", runs, set(), layer="1")
    with pytest.raises(ValueError, match="stores an order of 1: python run.py"):
        draw("reorder", runs, set(), layer="1")
    write_run(tmp_path)
    runs = read_runs(tmp_path)
    for name, message in (
        ("histogram", "packed files of two runs that differ in learning alone"),
        ("reorder", "needs the packed file of a run that stores an order: python run.py"),
        ("learning", "no layer of this run was learned"),
        ("layers", "no layer of the run has an error"),
        ("init", "no run without data: python run.py method=jlcm_init"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(name, runs, set())
    with pytest.raises(ValueError, match="there is no finished run"):
        draw("layers", runs[:0], set())
    with pytest.raises(ValueError, match="no figure is called nothing"):
        draw("nothing", runs, set())
