"""Figures that compare runs show the numbers of the records."""

import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from written_runs import PARAMETERS, write_run

from experiments.config import CONF
from experiments.figures import CAPTIONS
from experiments.figures.choose import draw
from experiments.figures.runs import pareto_front, plot_cost, plot_init, plot_pareto
from experiments.figures.style import INITS, METHODS, look, save
from experiments.runs import read_runs

points = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), max_size=12)


@given(points)
def test_pareto_front_is_what_nothing_dominates(found):
    sizes, values = [p[0] for p in found], [p[1] for p in found]
    expected = [
        not any(s <= size and v >= value and (s, v) != (size, value) for s, v in found)
        for size, value in found
    ]
    assert list(pareto_front(sizes, values)) == expected


def lines(panel):
    """The points (x, y) of each method or initialisation, by label."""
    found = {}
    for bars in panel.containers:
        found.setdefault(bars.get_label(), []).extend(map(tuple, bars.lines[0].get_xydata()))
    return found


def step(panel):
    (found,) = (line for line in panel.lines if line.get_label() == "Pareto front")
    return [tuple(point) for point in found.get_xydata()]


@pytest.fixture
def results(tmp_path):
    """Two seeds of ours, a method at two goals, another network, and options not compared."""
    write_run(
        tmp_path, "seed=0", top1=90.0, kl=0.10, file_bytes=100_000, seconds=50, memory=4 * 10**9
    )
    write_run(
        tmp_path, "seed=1", top1=94.0, kl=0.30, file_bytes=102_000, seconds=70, memory=6 * 10**9
    )
    write_run(tmp_path, "method=rtn", "alpha=5.33", top1=80.0, kl=0.5, file_bytes=150_000)
    write_run(tmp_path, "method=rtn", "alpha=7.5", top1=40.0, kl=2.0, file_bytes=90_000)
    write_run(tmp_path, "model=resnet50", "method=dfq", top1=70.0, kl=0.0, file_bytes=300_000)
    write_run(tmp_path, "learn=lnq", top1=99.0, kl=1e-9, file_bytes=1_000)
    write_run(tmp_path, "method=dfq", top1=1.0, kl=float("inf"), file_bytes=80_000)
    return tmp_path


def test_pareto_shows_means_errors_front_and_original(results):
    write_run(results, "model=resnet50", "method=squant", top1=60.0, kl=0.5, file_bytes=310_000)
    figure, source = draw("pareto_top1", read_runs(results), set())
    panel, other = figure.axes
    assert lines(panel) == {
        "JLCM": [(0.101, 92.0)],
        "round to nearest": [(0.09, 40.0), (0.15, 80.0)],
        "DFQ": [(0.08, 1.0)],
    }
    assert lines(other) == {"DFQ": [(0.3, 70.0)], "SQuant": [(0.31, 60.0)]}
    (ours,) = (bars for bars in panel.containers if bars.get_label() == "JLCM")
    error = statistics.stdev([90, 94]) / 2**0.5
    (bar,) = ours.lines[2][0].get_segments()
    assert bar[:, 1] == pytest.approx([92 - error, 92 + error])
    assert not any(
        np.isfinite(segment).all()
        for bars in panel.containers
        if bars is not ours and bars.has_yerr
        for segment in bars.lines[2][0].get_segments()
    )
    assert step(panel) == [(0.08, 1.0), (0.09, 40.0), (0.101, 92.0)]
    (original,) = (line for line in panel.lines if line.get_label() == "original")
    assert set(original.get_ydata()) == {95.0}
    assert f"original {2 * PARAMETERS / 1e6:.3g} MB" in panel.get_title()
    assert source == "7 runs; left out 1 with other options than the defaults"


def test_pareto_leaves_out_networks_with_nothing_to_compare(results):
    figure, source = draw("pareto_top1", read_runs(results), set())
    assert len(figure.axes) == 1 and source.startswith("6 runs")


def test_original_is_the_mean_over_seeds(tmp_path):
    write_run(tmp_path, "seed=0", original=90.0)
    write_run(tmp_path, "method=rtn", "seed=0", original=90.0)
    write_run(tmp_path, "seed=1", original=94.0)
    (panel,) = plot_pareto(read_runs(tmp_path)).axes
    (original,) = (line for line in panel.lines if line.get_label() == "original")
    assert set(original.get_ydata()) == {92.0}


def test_divergence_has_zero_on_its_axis_and_leaves_out_what_is_not_finite(results):
    write_run(results, "model=resnet50", "method=squant", top1=60.0, kl=0.5, file_bytes=310_000)
    figure, source = draw("pareto_kl", read_runs(results), set())
    panel, other = figure.axes
    assert lines(panel) == {
        "JLCM": [(0.101, pytest.approx(0.2))],
        "round to nearest": [(0.09, 2.0), (0.15, 0.5)],
    }
    assert step(panel) == [(0.09, 2.0), (0.101, pytest.approx(0.2))]
    assert lines(other) == {"DFQ": [(0.3, 0.0)], "SQuant": [(0.31, 0.5)]}
    for each in figure.axes:
        assert each.get_yscale() == "symlog" and each.get_ylim()[0] < 0
    assert "left out 1 without a finite kl" in source


def test_cost_shows_seconds_and_gigabytes(results):
    seconds, memory, *_ = draw("cost", read_runs(results), set())[0].axes
    assert lines(seconds)["JLCM"] == [(0.101, 60.0)]
    assert lines(memory)["JLCM"] == [(0.101, pytest.approx(5.0))]
    assert lines(seconds)["round to nearest"] == [(0.09, 2.0), (0.15, 2.0)]


def test_time_of_restored_layers_counts(tmp_path):
    parts = [{"name": "a", "seconds": 5.0, "restored": True}, {"name": "b", "seconds": 7.0}]
    write_run(tmp_path, seconds=2.0, learning=parts)
    assert lines(plot_cost(read_runs(tmp_path)).axes[0])["JLCM"] == [(0.25, 7.0)]


def test_options_that_were_chosen_are_compared(results):
    runs = read_runs(results)
    chosen = {"learn.allocation", "learn.distill.epochs", "learn.rotation"}
    assert (0.001, 99.0) in lines(draw("pareto_top1", runs, chosen)[0].axes[0])["JLCM"]


def test_init_has_a_panel_for_each_encoding(tmp_path):
    expected = {}
    for place, init in enumerate(INITS):
        for encoding in ("multi_scale", "multi_codebook"):
            kl = 0.1 * (place + 1) + (encoding == "multi_scale")
            overrides = ("method=jlcm_init", f"init={init}", f"encoding={encoding}")
            write_run(tmp_path, *overrides, kl=kl, file_bytes=100_000)
            expected[encoding, INITS[init].label] = [(0.1, pytest.approx(kl))]
    write_run(tmp_path, "method=rtn")
    figure, _ = draw("init", read_runs(tmp_path), set())
    drawn = {
        (panel.get_title().split(", ")[-1].replace("-", "_"), label): xy
        for panel in figure.axes
        for label, xy in lines(panel).items()
    }
    assert drawn == expected


def test_methods_look_alike_in_every_figure_and_unlike_each_other(results):
    methods = {path.stem.removesuffix("_short") for path in (CONF / "method").glob("*.yaml")}
    assert methods == METHODS.keys(), "a method needs a look of its own"
    assert {path.stem for path in (CONF / "init").glob("*.yaml")} == INITS.keys()
    for looks in (METHODS, INITS):
        assert len({style.label for style in looks.values()}) == len(looks)
        assert len({(style.colour, style.marker) for style in looks.values()}) == len(looks)
        assert len({style.colour for style in looks.values()}) == len(looks)
    by_label = {style.label: style for style in METHODS.values()}
    runs = read_runs(results)
    for name in ("pareto_top1", "pareto_kl", "cost"):
        figure, _ = draw(name, runs, set())
        for panel in figure.axes:
            for bars in panel.containers:
                style = by_label[bars.get_label()]
                assert to_hex(bars.lines[0].get_color()) == style.colour.lower()
                assert bars.lines[0].get_marker() == style.marker
        (legend,) = figure.legends
        shown = {text.get_text() for text in legend.get_texts()}
        assert {bars.get_label() for p in figure.axes for bars in p.containers} <= shown


def test_unknown_method_is_drawn_too(tmp_path):
    write_run(tmp_path)
    runs = read_runs(tmp_path)
    figure = plot_pareto(runs.assign(method="newest"))
    assert lines(figure.axes[0]) == {"newest": [(0.25, 90.0)]}
    assert look("newest").marker == "$n$"


def test_figures_of_nothing_say_so(tmp_path):
    write_run(tmp_path, "method=rtn", kl=float("nan"))
    runs = read_runs(tmp_path)
    with pytest.raises(ValueError, match="no run has file_bytes and kl"):
        plot_pareto(runs, "kl")
    with pytest.raises(ValueError, match="no run has file_bytes and kl"):
        plot_init(runs)


def test_captions_are_one_sentence():
    for name, caption in CAPTIONS.items():
        assert caption.endswith(".") and "\n" not in caption, name
        assert not any(stop in caption[:-1] for stop in (". T", ". A", ". B")), name


def test_files_are_the_same_each_time(results, tmp_path):
    runs = read_runs(results)
    for name in ("one", "two"):
        save(draw("pareto_top1", runs, set())[0], tmp_path / name / "figure")
    for suffix in ("pdf", "png"):
        first, second = (tmp_path / name / f"figure.{suffix}" for name in ("one", "two"))
        assert first.read_bytes() == second.read_bytes()
        assert sorted(p.name for p in first.parent.iterdir()) == ["figure.pdf", "figure.png"]
    pdf = (tmp_path / "one" / "figure.pdf").read_bytes()
    assert b"/FontFile2" in pdf and b"/Subtype /Type3" not in pdf  # embedded TrueType
    assert b"CreationDate" not in pdf
    assert b"Matplotlib" not in (tmp_path / "one" / "figure.png").read_bytes()


def test_shuffled_runs_give_the_same_figure(results, tmp_path):
    runs = read_runs(results)
    save(draw("pareto_kl", runs, set())[0], tmp_path / "a", ("png",))
    save(draw("pareto_kl", runs[::-1].reset_index(drop=True), set())[0], tmp_path / "b", ("png",))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
