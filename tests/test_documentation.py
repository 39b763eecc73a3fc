"""What the documentation tells the reader to type works, and prints what is shown."""

import csv
import io
import os
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from experiments.config import register
from experiments.labels import LABELS
from experiments.overrides import check_overrides
from experiments.tables.write import REACHED

register()

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))]
#: Pages whose commands use the files that their Python has made: everything runs, in order.
WHOLE = ["docs/tutorial.md"]
#: Words that mean something to sweeps alone.
LAUNCHING = ("-m", "compute=", "hydra.launcher.", "+hydra.launcher.")
#: Published tables that the README quotes: name, network, measure, how they are called there, and
#: which value is the best.
HEADLINES = [
    ("table5_digits", "resnet18", "top-1 %", "ResNet-18, digits, top-1 %", max),
    (
        "table5_lite",
        "efficientnet_lite0",
        "top-1 %",
        "EfficientNet-Lite0, ImageNet labels, top-1 %",
        max,
    ),
    ("table6a_tiny", "tiny_sd", "CLIP score", "small Stable Diffusion, CLIP score", max),
    ("table6b_small", "smollm2_135m", "perplexity", "SmolLM2-135M, perplexity", min),
]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


def blocks(page):
    """Language and text of each block of code."""
    return _BLOCK.findall((ROOT / page).read_text())


def has(page, language):
    return any(found == language for found, _ in blocks(page))


def commands(page):
    """Command lines of the page, without comments."""
    texts = [text.replace("\\\n", " ") for language, text in blocks(page) if language == "bash"]
    lines = [line.split("  #")[0].strip() for text in texts for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def check_output(shown, printed):
    """Words are the same; numbers nearly, since training differs from processor to processor."""
    assert [_NUMBER.sub("#", line).split() for line in shown.splitlines()] == [
        _NUMBER.sub("#", line).split() for line in printed.splitlines()
    ]
    for expected, found in zip(_NUMBER.findall(shown), _NUMBER.findall(printed), strict=True):
        expected, found = (float(number.replace(",", "")) for number in (expected, found))
        assert found == pytest.approx(expected, rel=0.1, abs=0.1), (shown, printed)


def execute(page, shell=None):
    """Run the page's Python in order in one namespace, and its commands where `shell` is given."""
    names, printed = {}, ""
    with torch.random.fork_rng():
        for language, text in blocks(page):
            match language:
                case "python":
                    output = io.StringIO()
                    with redirect_stdout(output):
                        exec(compile(text, page, "exec"), names)
                    printed = output.getvalue()
                case "text":
                    check_output(text, printed)
                case "bash" if shell is not None:
                    for line in text.replace("\\\n", " ").splitlines():
                        shell(line)
    return names, printed


def headlines():
    """Lines of the README's table of results, from the published tables."""
    for table, model, measure, name, best_of in HEADLINES:
        with (ROOT / f"results/tables/{table}.csv").open() as file:
            rows = [
                r for r in csv.DictReader(file) if (r["model"], r["measure"]) == (model, measure)
            ]
        # Runs that take more bytes than asked do not count, as in the tables.
        rows = [
            r for r in rows if r["ours"] and float(r["true alpha"]) > REACHED * float(r["alpha"])
        ]
        for alpha in sorted({row["alpha"] for row in rows}, key=float):
            cells = {r["method"]: r for r in rows if r["alpha"] == alpha}
            if "jlcm" not in cells:
                continue
            ours = cells["jlcm"]
            others = {m: float(r["ours"]) for m, r in cells.items() if not m.startswith("jlcm")}
            best = best_of(others, key=others.get)
            packed = float(ours["file bytes"]) / 1e6
            shown = [
                name,
                alpha,
                f"{packed * float(ours['alpha total']):.2f} → {packed:.2f}",
                f"{float(ours['original']):.1f}",
                f"**{float(ours['ours']):.1f}**",
                f"{others[best]:,.1f} ({LABELS[best]})",
                f"{others['rtn']:,.1f}",
            ]
            yield f"| {' | '.join(shown)} |"


def test_results_in_the_readme_are_the_published_ones():
    lines = (ROOT / "README.md").read_text().splitlines()
    shown = [line for line in lines if any(line.startswith(f"| {h[3]} |") for h in HEADLINES)]
    assert shown == list(headlines())


@pytest.mark.parametrize("page", [page for page in PAGES if has(page, "bash")])
def test_commands_compose(page):
    """Each command parses: make targets and scripts exist, and configurations compose."""
    for command in commands(page):
        words = shlex.split(command)
        if words[0] == "make":
            subprocess.run([*words, "-n"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        elif words[:2] == ["python", "run.py"]:
            if "--help" not in words:
                words = [w for w in words[2:] if not w.startswith(LAUNCHING)]
                check_overrides([re.sub(r"=([^,]+),.*", r"=\1", w) for w in words])
        elif words[:2] == ["python", "-m"]:
            assert words[2] == "pip" or (ROOT / f"{words[2].replace('.', '/')}.py").is_file()
        else:
            script = words[0] == "python" and (ROOT / words[1]).is_file()
            assert script or words[0] == "wandb", command


def test_readme_starts_with_two_commands():
    run, test = commands("README.md")[:2]
    assert run.startswith("make run") and test.startswith("make test")


@pytest.mark.parametrize("page", [p for p in PAGES if has(p, "python") and p not in WHOLE])
def test_examples(page, tmp_path, monkeypatch):
    """The Python of a page runs as it stands."""
    if page == "docs/huggingface.md":
        pytest.importorskip("transformers")
    if page == "docs/diffusion.md":
        pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    _, printed = execute(page)
    if page == "README.md":
        alpha, shape = printed.splitlines()
        assert 7 < float(alpha) < 7.5 and shape == "torch.Size([1, 10])"


def test_tutorial(tmp_path, monkeypatch):
    """Every block of the tutorial runs, and what its text says of the figures is true."""
    monkeypatch.chdir(tmp_path)

    def shell(line):
        program, script, *arguments = shlex.split(line)
        assert (program, script) == ("python", "run.py")
        result = subprocess.run(
            [sys.executable, str(ROOT / script), *arguments],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr[-3000:]

    names, _ = execute("docs/tutorial.md", shell)
    accuracy, size = names["accuracy"], names["jlcm"].footprint(names["packed"])
    original, packed, hard = accuracy(names["model"]), accuracy(names["packed"]), names["hard"]
    assert sum(p.numel() for p in names["model"].parameters()) == 47_610
    assert original > 96
    assert packed < original < accuracy(names["allocated"]) + 1.5
    assert accuracy(names["rounded"][7.5]) < original - 3
    assert 7.5 <= size.alpha_layers < 7.51
    assert accuracy(names["ends"]) > packed and accuracy(names["inner"]) > packed
    assert hard["without data"] < 90 < hard["allocation"]
    assert original < hard["and distillation"] + 1.5
    assert all(layer.after <= layer.before for layer in names["layers"])
    assert names["runs"]["learned"] > 95 and names["runs"]["without data"] < 50


@pytest.mark.slow
def test_readme_commands_run(tmp_path):
    """Every command of the README beside make, whole; sweeps take minutes."""
    data = Path(os.environ.get("JLCM_DATA", ROOT.parent / "shared" / "data")) / "vision"
    if not (data / "imagenet_like_1000.tsv").is_file():
        pytest.skip(f"no images in {data}: set JLCM_DATA")
    lists = {
        "DIR/list.tsv": str(data / "imagenet_like_1000.tsv"),
        "DIR": str(data / "imagenet_like_1000"),
    }
    for command in commands("README.md"):
        for placeholder, value in lists.items():
            command = command.replace(placeholder, value)
        words = shlex.split(command)
        if words[0] != "python" or "pip" in words:
            continue
        if "run.py" in words and "--help" not in words:
            words += [f"results_dir={tmp_path}"]
        subprocess.run([sys.executable, *words[1:]], cwd=ROOT, check=True)
