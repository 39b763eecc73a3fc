"""Prompts for text-to-image pipelines: a file's, DiffusionDB's, or captions of coloured digits."""

import csv
import io
import json
import random
from dataclasses import dataclass
from pathlib import Path

from experiments.config import PromptsConfig
from experiments.data import coloured_digits
from experiments.data.coloured_digits import Caption
from experiments.data.text import read_text
from experiments.errors import first_line
from jlcm.config import Invalid

#: Prompts that users of Stable Diffusion have written (Wang et al., DiffusionDB, 2023).
_DIFFUSIONDB = "poloclub/diffusiondb"


@dataclass(kw_only=True)
class Prompts:
    """Prompts without repetition.

    Attributes:
        evaluation: those that pictures are evaluated on.
        calibration: others, for methods that learn; fewer than asked for where there are no more.
        captions: what the prompts for the evaluation say, where pictures can be judged by it.
    """

    evaluation: list[str]
    calibration: list[str]
    captions: list[Caption] | None = None


def check_prompts(data: PromptsConfig, *, built_in: bool) -> None:
    """Check options and files, before a pipeline is fetched.

    Args:
        data: the options.
        built_in: whether the model brings prompts of its own.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file holds no prompts, or an option is out of range.
    """
    for option in ("noise_seeds", "steps", "calibration_samples"):
        if getattr(data, option) < 1:
            raise Invalid(f"data.{option}={getattr(data, option)} must be at least 1")
    if not data.guidance >= 1:
        raise Invalid(f"data.guidance={data.guidance} must be at least 1, which means none")
    for option in ("prompts", "calibration_prompts"):
        if getattr(data, option) is not None:
            read_prompts(getattr(data, option), f"data.{option}")
    own = len(coloured_digits.split_captions()[1])
    if built_in and data.prompts is None and (data.limit is None or data.limit > own):
        raise Invalid(f"data.limit={data.limit}: there are {own} captions for the evaluation")


def load_prompts(data: PromptsConfig, *, built_in: bool) -> Prompts:
    """Find the prompts.

    Args:
        data: where they come from, and how many.
        built_in: take captions of coloured digits where no file is given.

    Returns:
        The prompts, the same for all seeds. None is in both lists.

    Raises:
        ConnectionError: the hub cannot be reached.
        FileNotFoundError, ValueError: as `check_prompts`.
    """
    check_prompts(data, built_in=built_in)
    captions = None
    if data.prompts is None and built_in:
        others, captions = coloured_digits.split_captions()
        captions = captions[: data.limit]
        count = len(coloured_digits.DIGITS)  # each digit in all templates
        evaluation = [coloured_digits.prompt(c, i // count) for i, c in enumerate(captions)]
        calibration = [coloured_digits.prompt(c, i) for i, c in enumerate(others)]
    else:
        if data.prompts is None:
            found = _diffusiondb()
        else:
            found = read_prompts(data.prompts, "data.prompts")
        random.Random(0).shuffle(found)
        count = len(found) if data.limit is None else data.limit
        evaluation, calibration = found[:count], found[count:]
    if data.calibration_prompts is not None:
        seen = set(evaluation)
        given = read_prompts(data.calibration_prompts, "data.calibration_prompts")
        calibration = [text for text in given if text not in seen]
    return Prompts(
        evaluation=evaluation,
        calibration=calibration[: data.calibration_samples],
        captions=captions,
    )


def read_prompts(path: str, option: str) -> list[str]:
    """Read prompts from a file of UTF-8: lines, a JSON list, or the column Prompt of a TSV.

    Args:
        path: of the file; its suffix tells which it is.
        option: that named it, for messages.

    Returns:
        The prompts in the file's order, without repetitions.

    Raises:
        FileNotFoundError: there is no such file.
        Invalid: (a ValueError) it is empty, not text, or of another layout.
    """
    text = read_text(path, option)
    if "\0" in text:
        raise Invalid(f"{option}={path} is not a text file")
    match Path(path).suffix.lower():
        case ".json":
            try:
                found = json.loads(text)
            except ValueError as error:
                raise Invalid(f"{option}={path} is not JSON: {error}") from error
            if not isinstance(found, list) or not all(isinstance(x, str) for x in found):
                raise Invalid(f"{option}={path} must hold a list of texts")
        case ".tsv":
            rows = csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
            if "Prompt" not in (rows.fieldnames or ()):
                raise Invalid(f"{option}={path} has no column Prompt in its first line")
            found = [row["Prompt"] or "" for row in rows]
        case _:
            found = text.splitlines()
    found = list(dict.fromkeys(x.strip() for x in found if x.strip()))
    if not found:
        raise Invalid(f"{option}={path} holds no prompts")
    return found


def _diffusiondb() -> list[str]:
    """All prompts of DiffusionDB, from its table on the hub (200 MB)."""
    import pandas as pd
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(_DIFFUSIONDB, "metadata.parquet", repo_type="dataset")
    except Exception as error:  # of httpx or of the hub
        reason = first_line(error)
        raise ConnectionError(
            f"DiffusionDB cannot be read from the hub ({reason}): "
            "data.prompts=FILE takes a local file"
        ) from error
    texts = pd.read_parquet(path, columns=["prompt"])["prompt"]
    return sorted({text.strip() for text in texts if text and text.strip()})
