"""Text for language models as windows of token ids: to measure perplexity on, and to learn from."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from experiments.cache import hash_file
from experiments.config import CommonsenseConfig
from experiments.data.commonsense import commonsense_folder, passages, stories
from experiments.data.generate import generated_windows
from experiments.errors import first_line
from experiments.models.language import LanguageModel, quiet
from jlcm.config import Invalid, check_choice

CALIBRATIONS = ("coqa", "generated")
#: Documents of a hub's data set that are shuffled at a time.
_SHUFFLED = 1000
#: Words in a row that two texts have in common where they overlap, as in Brown et al. (2020).
_OVERLAP = 13


def check_text(data: CommonsenseConfig) -> None:
    """Check options and files, before a model is fetched.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file holds no text, or options do not go together.
    """
    check_choice("data.calibration", data.calibration, CALIBRATIONS)
    for option in ("window", "calibration_length"):
        if getattr(data, option) < 2:
            raise Invalid(f"data.{option}={getattr(data, option)} must be at least 2 tokens")
    for option in ("windows", "calibration_samples"):
        if getattr(data, option) < 1:
            raise Invalid(f"data.{option}={getattr(data, option)} must be at least 1")
    if data.calibration_text is not None and data.calibration_dataset is not None:
        raise Invalid("give data.calibration_text or data.calibration_dataset, not both")
    for option in ("text", "calibration_text"):
        if getattr(data, option) is not None:
            read_text(getattr(data, option), f"data.{option}")
    if data.text is not None and data.calibration_text is not None:
        same = os.path.samefile(data.text, data.calibration_text)
        if same or hash_file(data.text) == hash_file(data.calibration_text):
            raise Invalid(
                f"data.calibration_text={data.calibration_text} is the text of data.text: "
                "what a method has seen must not be evaluated on"
            )


def evaluation_windows(data: CommonsenseConfig, model: LanguageModel) -> Tensor:
    """Cut the text for the perplexity into windows.

    Args:
        data: the text, `data.text` or BoolQ's passages, and the size and number of windows.
        model: whose tokenizer is used, and whose limits are checked.

    Returns:
        The first `data.windows` windows without overlap, fewer where the text is shorter, int64
        (windows, data.window).

    Raises:
        ConnectionError: BoolQ cannot be fetched.
        FileNotFoundError, ValueError: the file cannot be used, or the model cannot read such
            windows.
    """
    check_length(model, data.window, "data.window")
    text, source = _evaluation_text(data), data.text or "BoolQ"
    return tokenise(text, model, length=data.window, source=source)[: data.windows]


def _evaluation_text(data: CommonsenseConfig) -> str:
    """The text for the perplexity."""
    if data.text is None:
        return passages(commonsense_folder())
    return read_text(data.text, "data.text")


def calibration_windows(
    data: CommonsenseConfig, model: LanguageModel, *, seed: int, device: torch.device
) -> Tensor:
    """Windows of token ids to learn from: of a file, the hub, CoQA, or written by the model itself.

    The stories of CoQA are those that have nothing in common with the text for the perplexity.

    Args:
        data: the source; at most `calibration_samples` windows of `calibration_length` tokens.
        model: the original model, on the CPU.
        seed: of the choice of windows, or of the generation.
        device: where the model generates.

    Returns:
        int64 (samples, data.calibration_length).

    Raises:
        ConnectionError: the hub cannot be reached.
        FileNotFoundError, ValueError: as `evaluation_windows`.
    """
    count, length = data.calibration_samples, data.calibration_length
    check_length(model, length, "data.calibration_length")
    if data.calibration_dataset is not None:
        return _hub_windows(data.calibration_dataset, model, count=count, length=length, seed=seed)
    path = data.calibration_text
    if path is None and data.calibration == "generated":
        return generated_windows(model, count=count, length=length, seed=seed, device=device)
    if path is None:
        apart = without_overlap(stories(commonsense_folder()), _evaluation_text(data))
        text = "\n\n".join(apart)
    else:
        text = read_text(path, "data.calibration_text")
    windows = tokenise(text, model, length=length, source=path or "CoQA")
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:count]]


def without_overlap(documents: Iterable[str], text: str) -> list[str]:
    """Leave out the documents that share 13 words in a row with a text.

    Args:
        documents: to choose from.
        text: that is evaluated on.
    """
    taken = _runs(text)
    return [document for document in documents if taken.isdisjoint(_runs(document))]


def _runs(text: str) -> set[tuple[str, ...]]:
    """All runs of 13 words, without case and punctuation."""
    words = re.findall(r"\w+", text.lower())
    return set(zip(*(words[start:] for start in range(_OVERLAP)), strict=False))


def read_text(path: str, option: str) -> str:
    """Read a UTF-8 file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, or not UTF-8.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{option}={path} does not exist: set it to a UTF-8 text file")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Invalid(f"{option}={path} is not a UTF-8 text file: {error}") from error
    if not text.strip():
        raise Invalid(f"{option}={path} is empty")
    return text


def check_length(model: LanguageModel, length: int, option: str) -> None:
    """Refuse windows that are longer than what the model was made for.

    Raises:
        Invalid: (a ValueError) naming the longest that it can read.
    """
    longest = model.module.config.max_position_embeddings
    if length > longest:
        raise Invalid(f"{option}={length}: {model.name} reads at most {longest} tokens at once")


def tokenise(text: str, model: LanguageModel, *, length: int, source: str) -> Tensor:
    """Cut a text into windows of tokens; what is left at its end is dropped.

    Args:
        text: the whole text, tokenised as one, as Frantar et al. (GPTQ, 2023) do.
        model: whose tokenizer is used.
        length: tokens of a window.
        source: of the text, for messages.

    Returns:
        int64 (windows, length).

    Raises:
        ValueError: the text is shorter than a window, or the tokenizer is not the model's.
    """
    with quiet():  # it warns of texts that are longer than the model's windows
        ids = torch.tensor(model.tokenizer(text)["input_ids"])
    if len(ids) < length:
        raise ValueError(f"{source} has {len(ids)} tokens, less than a window of {length}")
    vocabulary = model.module.config.vocab_size
    if ids.max() >= vocabulary:
        raise ValueError(
            f"the tokenizer of {model.name} gives token {ids.max()}, but the model has a "
            f"vocabulary of {vocabulary}: tokenizer and model do not belong together"
        )
    return ids[: len(ids) // length * length].view(-1, length)


def _hub_windows(
    dataset: str, model: LanguageModel, *, count: int, length: int, seed: int
) -> Tensor:
    """Windows of the first documents of a shuffled data set, which is read as a stream."""
    import datasets

    name, _, subset = dataset.partition(":")
    documents, tokens = [], 0
    try:
        stream = datasets.load_dataset(name, subset or None, split="train", streaming=True)
        for row in stream.shuffle(seed=seed, buffer_size=_SHUFFLED):
            documents.append(row["text"])
            tokens += len(model.tokenizer(row["text"], add_special_tokens=False)["input_ids"])
            if tokens >= count * length:
                break
    except KeyError as error:
        raise ValueError(f"data.calibration_dataset={dataset} has no field text") from error
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise ConnectionError(
            f"data.calibration_dataset={dataset} cannot be read from the hub ({reason}): "
            "data.calibration_text=FILE takes a local file, data.calibration=generated none at all"
        ) from error
    return tokenise("\n\n".join(documents), model, length=length, source=dataset)[:count]
