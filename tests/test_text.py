"""Text as windows of tokens, what is refused, and text that a model writes itself."""

import random
import shutil

import pytest
import torch
from tiny_language import WORDS, make_llama, make_tokenizer

from experiments.config import CommonsenseConfig
from experiments.data import text
from experiments.data.generate import generate, generated_windows, special_ids
from experiments.data.text import (
    calibration_windows,
    check_text,
    evaluation_windows,
    tokenise,
    without_overlap,
)
from experiments.models.language import LanguageModel

datasets = pytest.importorskip("datasets")
pytest.importorskip("transformers")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return LanguageModel(module=make_llama(), tokenizer=make_tokenizer(), name="tiny")


def prose(count, seed=0):
    return " ".join(random.Random(seed).choices(WORDS, k=count))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(prose(107))
    return path


def given(**options):
    return CommonsenseConfig(**{"window": 10, "calibration_length": 10} | options)


def test_windows_are_the_first_tokens_in_order(file, model):
    ids = model.tokenizer(file.read_text())["input_ids"]
    windows = evaluation_windows(given(text=str(file), windows=4), model)
    assert windows.dtype == torch.int64 and windows.tolist() == [
        ids[i : i + 10] for i in range(0, 40, 10)
    ]
    # A short text has fewer windows; its last tokens fill none.
    assert evaluation_windows(given(text=str(file)), model).flatten().tolist() == ids[:100]


def test_boolq_is_the_text_where_none_is_given(model, monkeypatch, tmp_path):
    lines = ['{"passage": "Cats -- the cat sat"}\n', '{"passage": "A -- B -- a dog ran"}\n']
    (tmp_path / "boolq.jsonl").write_text(lines[0] + lines[0] + lines[1])
    monkeypatch.setattr(text, "commonsense_folder", lambda: tmp_path)
    windows = evaluation_windows(given(window=3), model)
    words = [[model.tokenizer.decode(i) for i in window] for window in windows.tolist()]
    assert words == [["the", "cat", "sat"], ["<unk>", "<unk>", "a"]]  # "B -- a dog ran"


def test_text_that_cannot_be_used(file, tmp_path, model):
    with pytest.raises(FileNotFoundError, match=r"data\.text=.*none\.txt does not exist"):
        check_text(given(text=str(tmp_path / "none.txt")))
    file.write_text(" \n")
    with pytest.raises(ValueError, match=r"data\.calibration_text=.*text\.txt is empty"):
        check_text(given(calibration_text=str(file)))
    file.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"data\.text=.* not a UTF-8 text file"):
        check_text(given(text=str(file)))
    file.write_text("the cat")
    with pytest.raises(ValueError, match=r"text\.txt has 2 tokens, less than a window of 10"):
        evaluation_windows(given(text=str(file)), model)


@pytest.mark.parametrize("option", ["window", "windows", "calibration_samples"])
def test_numbers_out_of_range(option):
    with pytest.raises(ValueError, match=rf"data\.{option}=0 must be at least"):
        check_text(given(**{option: 0}))


def test_windows_that_the_model_cannot_read(file, model):
    with pytest.raises(ValueError, match=r"data\.window=65: tiny reads at most 64 tokens"):
        evaluation_windows(given(text=str(file), window=65), model)
    with pytest.raises(ValueError, match=r"data\.calibration_length=65: tiny reads at most 64"):
        calibration_windows(given(calibration_length=65), model, seed=0, device=CPU)
    other = make_tokenizer((*WORDS, "extra"))
    wrong = LanguageModel(module=model.module, tokenizer=other, name="tiny")
    with pytest.raises(ValueError, match="token 15, but the model has a vocabulary of 15"):
        tokenise("the cat extra", wrong, length=2, source="a")


def test_calibration_and_evaluation_must_differ(file, tmp_path):
    copy = shutil.copy(file, tmp_path / "copy.txt")
    link = tmp_path / "link.txt"
    link.symlink_to(file)
    for other in (file, copy, link):
        with pytest.raises(ValueError, match="must not be evaluated on"):
            check_text(given(text=str(file), calibration_text=str(other)))
    copy.write_text(prose(107, seed=1))
    check_text(given(text=str(file), calibration_text=str(copy)))
    with pytest.raises(ValueError, match=r"data\.calibration='c4' is not one of"):
        check_text(given(calibration="c4"))
    with pytest.raises(ValueError, match="not both"):
        check_text(given(calibration_text=str(file), calibration_dataset="owner/data"))


def test_calibration_windows_of_a_file(file, model):
    data = given(calibration_text=str(file), calibration_samples=4)
    first, again, other = (
        calibration_windows(data, model, seed=seed, device=CPU) for seed in (0, 0, 1)
    )
    every = tokenise(file.read_text(), model, length=10, source="a").tolist()
    assert torch.equal(first, again) and not torch.equal(first, other)
    chosen = [every.index(window) for window in first.tolist()]
    assert len(set(chosen)) == 4


def test_stories_are_learned_from_where_nothing_else_is_given(file, model, monkeypatch):
    told = [prose(40, seed) for seed in range(1, 6)]
    told[2] = f"the cat {file.read_text()[30:150]} the cat"
    monkeypatch.setattr(text, "commonsense_folder", lambda: None)
    monkeypatch.setattr(text, "stories", lambda folder: told)
    windows = calibration_windows(given(text=str(file)), model, seed=0, device=CPU)
    every = tokenise("\n\n".join(told[:2] + told[3:]), model, length=10, source="a")
    assert sorted(windows.tolist()) == sorted(every.tolist())


def test_texts_overlap_from_thirteen_words_on():
    words = [f"w{i}" for i in range(40)]
    text = " ".join(words)
    shared = {count: f"other {' '.join(words[10 : 10 + count])} other" for count in (12, 13, 30)}
    assert without_overlap([*shared.values(), "w1", ""], text) == [shared[12], "w1", ""]
    assert without_overlap([" - ".join(words).upper()], text) == []
    assert without_overlap(["w1"], "") == ["w1"]


def test_calibration_windows_of_the_hub(model, monkeypatch):
    asked = []

    class Stream(list):
        def shuffle(self, *, seed, buffer_size):
            return random.Random(seed).sample(self, len(self))

    def load_dataset(*arguments, **options):
        asked.append((*arguments, options))
        return Stream({"text": prose(7, seed)} for seed in range(20))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = given(calibration_dataset="owner/data:en", calibration_samples=5)
    windows = calibration_windows(data, model, seed=0, device=CPU)
    assert windows.shape == (5, 10) and windows.max() < 15
    assert asked == [("owner/data", "en", {"split": "train", "streaming": True})]

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **o: Stream([{"content": ""}]))
    with pytest.raises(ValueError, match="owner/data:en has no field text"):
        calibration_windows(data, model, seed=0, device=CPU)

    def refuse(*arguments, **options):
        raise ConnectionError("Couldn't reach the Hugging Face Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ConnectionError, match=r"reach .*data\.calibration_text=FILE"):
        calibration_windows(data, model, seed=0, device=CPU)


def test_generated_windows_are_kept(model, monkeypatch, tmp_path):
    monkeypatch.setenv("JLCM_CACHE", str(tmp_path))
    data = given(calibration="generated", calibration_samples=3)
    windows = [calibration_windows(data, model, seed=s, device=CPU) for s in (0, 0, 1)]
    assert torch.equal(windows[0], windows[1]) and not torch.equal(windows[0], windows[2])
    assert windows[0].shape == (3, 10) and len(list(tmp_path.glob("generated-*"))) == 2
    # Another model writes another text.
    other = LanguageModel(module=make_llama(seed=1), tokenizer=model.tokenizer, name="tiny")
    assert not torch.equal(
        generated_windows(other, count=3, length=10, seed=0, device=CPU), windows[0]
    )


def test_text_follows_the_models_distribution(model):
    """Against probabilities computed without a cache, in one go."""
    special = torch.tensor(special_ids(model.tokenizer))
    assert special.tolist() == [0, 1, 2]
    generator = torch.Generator().manual_seed(0)
    windows = generate(model.module, special, 200, 40, generator=generator, device=CPU)
    logs = model.module(windows).logits.log_softmax(-1)
    assert not torch.isin(windows[:, 0], special).any()
    ended = torch.isin(windows[:, :-1], special)
    greedy = logs[:, :4].argmax(-1)
    assert torch.equal(greedy[~ended[:, :4]], windows[:, 1:5][~ended[:, :4]])
    # What follows the end of a text is a first token again, and never a special one.
    assert ended.any() and not torch.isin(windows[:, 1:][ended], special).any()
    drawn = ~ended[:, 4:]
    likelihood = logs[:, 4:-1].gather(-1, windows[:, 5:, None])[..., 0][drawn]
    entropy = -(logs.exp() * logs).sum(-1)[:, 4:-1][drawn]
    assert -likelihood.mean().item() == pytest.approx(entropy.mean().item(), rel=0.03)
    # Each token is drawn as often as the probabilities say.
    expected = logs[:, 4:-1].exp()[drawn].sum(0)
    found = torch.bincount(windows[:, 5:][drawn], minlength=15)
    assert ((found - expected).abs() < 4 * expected.sqrt()).all()


def test_outputs_that_are_not_finite(model):
    broken = make_llama()
    broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or Inf"):
        generate(broken, torch.tensor([0]), 2, 5, generator=torch.Generator(), device=CPU)
