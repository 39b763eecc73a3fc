"""Prompts from files and captions: layouts, what is held out, and what is refused."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from experiments.config import PromptsConfig
from experiments.data import coloured_digits
from experiments.data.coloured_digits import Caption
from experiments.data.prompts import load_prompts, read_prompts


def written(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "a red car\n\n  a blue dog \na red car\n"),
        ("a.json", json.dumps(["a red car", "a blue dog", "a red car"])),
        ("a.tsv", 'Prompt\tCategory\na red car\t"x\na blue dog\ty\n'),
    ],
)
def test_three_layouts_hold_the_same_prompts(tmp_path, name, content):
    path = written(tmp_path / name, content)
    assert read_prompts(path, "data.prompts") == ["a red car", "a blue dog"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "is empty"),
        ("a.txt", " \n\n", "is empty"),
        ("a.txt", b"\x89PNG\r\n\x1a\n\xff\xfe", "UTF-8"),
        ("a.txt", b"a\0b", "not a text file"),
        ("a.json", "[1, 2]", "list of texts"),
        ("a.json", "{", "not JSON"),
        ("a.json", "[]", "no prompts"),
        ("a.tsv", "Text\na\n", "no column Prompt"),
        ("a.tsv", "Prompt\n\n", "no prompts"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, name, content, message):
    path = written(tmp_path / name, content)
    for option in ("prompts", "calibration_prompts"):
        with pytest.raises(ValueError, match=message) as error:
            load_prompts(PromptsConfig(**{option: path}), built_in=True)
        assert f"data.{option}={path}" in str(error.value)
    with pytest.raises(FileNotFoundError, match="data.prompts=/nowhere"):
        load_prompts(PromptsConfig(prompts="/nowhere"), built_in=True)


def test_calibration_sees_no_prompt_of_the_evaluation(tmp_path):
    path = written(tmp_path / "a.txt", "\n".join(f"prompt {i}" for i in range(20)))
    found = load_prompts(PromptsConfig(prompts=path, limit=12), built_in=False)
    again = load_prompts(PromptsConfig(prompts=path, limit=12), built_in=False)
    assert found == again and found.captions is None
    assert len(found.evaluation) == 12 and len(found.calibration) == 8
    assert not set(found.evaluation) & set(found.calibration)
    both = PromptsConfig(prompts=path, limit=12, calibration_prompts=path, calibration_samples=5)
    assert len(load_prompts(both, built_in=False).calibration) == 5
    assert not load_prompts(PromptsConfig(prompts=path, limit=None), built_in=False).calibration


def test_captions_for_the_evaluation_are_never_trained_on():
    train, held_out = coloured_digits.split_captions()
    assert len(train) == 1440 and len(held_out) == 240
    assert len({*train, *held_out}) == 1680 == 10 * 8 * 7 * 3
    assert set(Counter(c.digit for c in held_out).values()) == {24}
    found = load_prompts(PromptsConfig(limit=40), built_in=True)
    assert len(set(found.evaluation)) == 40 and found.captions == held_out[:40]
    assert len(set(found.calibration)) == 256
    for text, caption in zip(found.evaluation, found.captions, strict=True):
        assert coloured_digits.DIGITS[caption.digit] in text
    for template in range(4):  # every digit in every template
        part = found.captions[10 * template : 10 * template + 10]
        assert [c.digit for c in part] == list(range(10))
    with pytest.raises(ValueError, match="240 captions"):
        load_prompts(PromptsConfig(limit=241), built_in=True)


def test_pictures_show_what_captions_say():
    pixels, labels = coloured_digits.grey_digits("test")
    captions = [Caption(3, 0, 7, stroke) for stroke in (0, 1, 2)] * 20

    def drawn() -> torch.Tensor:
        return coloured_digits.draw(captions, pixels, labels, torch.Generator().manual_seed(0))

    pictures = drawn()
    assert torch.equal(pictures, drawn())
    assert pictures.shape == (60, 3, 32, 32) and 0 <= pictures.min() and pictures.max() <= 1
    # Red on black: the corners are paper, and the more is red, the bolder the stroke is.
    assert pictures[:, :, 0, 0].max() < 0.2
    ink = (pictures[:, 0] > 0.5).float().mean((1, 2)).view(20, 3).mean(0)
    assert ink[0] < ink[1] < ink[2]
    assert (pictures[:, 1:] < 0.3).all()
