"""Text-to-image pipelines of diffusers: the project's small one, a local folder or the hub."""

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from experiments.config import DiffusionModelConfig
from experiments.errors import first_line
from experiments.models import tiny_diffusion
from experiments.models.language import DTYPES, quiet
from jlcm.config import Invalid, check_choice

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from transformers import CLIPModel, CLIPProcessor

SOURCES = ("tiny_sd", "diffusers")
_INDEX = "model_index.json"
_LOCAL = "model.name=FOLDER takes a local one instead"
_LOCAL_CLIP = "model.clip=FOLDER takes a local one instead"


def check_diffusion_model(model: DiffusionModelConfig) -> None:
    """Check what needs neither a network nor weights.

    Raises:
        FileNotFoundError: a path does not exist, or holds no pipeline or CLIP.
        Invalid: (a ValueError) for options, or where packages are missing.
    """
    check_choice("model.source", model.source, SOURCES)
    check_choice("model.dtype", model.dtype, DTYPES)
    if model.weights is not None:
        raise Invalid(f"model.weights={model.weights} is for vision networks: {_LOCAL}")
    needed = ("diffusers", "transformers", "torchmetrics")
    if missing := [package for package in needed if find_spec(package) is None]:
        raise Invalid(
            f"model.source={model.source} needs {', '.join(missing)}: "
            "pip install -c constraints.txt -e '.[diffusion]'"
        )
    if model.source == "diffusers":
        _check_folder("model.name", model.name, _INDEX, "a pipeline of diffusers")
        if Path(model.name).is_dir():
            _check_components(Path(model.name))
        if model.clip is None:
            raise Invalid("model.clip=FOLDER must name a CLIP that scores the pictures")
    if model.clip is not None:
        _check_folder("model.clip", model.clip, "config.json", "a CLIP of transformers")


def _check_folder(option: str, name: str, file: str, what: str) -> None:
    """Check a folder; "owner/model" is a name on the hub unless there is a folder."""
    folder = Path(name)
    path = name.startswith(("/", ".", "~")) or name.count("/") != 1
    if path and not folder.is_dir():
        raise FileNotFoundError(f"{option}={name} is not a folder with {what}")
    if folder.is_dir() and not (folder / file).is_file():
        raise FileNotFoundError(f"{option}={name} is incomplete: {what} has a file {file}")


def _check_components(folder: Path) -> None:
    """Check that each component has its files; a tokenizer without any is an empty one."""
    try:
        parts = json.loads((folder / _INDEX).read_text()).items()
    except (ValueError, AttributeError) as error:
        raise Invalid(f"model.name={folder}: {_INDEX} is damaged ({error})") from error
    for name, part in parts:
        named = isinstance(part, list) and part[0] is not None and name != "safety_checker"
        if named and not any((folder / name).glob("*")):
            raise FileNotFoundError(f"model.name={folder} is incomplete: it lacks the {name}")


def load_pipeline(model: DiffusionModelConfig) -> "DiffusionPipeline":
    """Load a pipeline. Only safetensors weights are read, and no code of a hub.

    Args:
        model: where it comes from, and its dtype.

    Returns:
        The pipeline on the CPU, in evaluation mode, without a safety checker, which would black
        out pictures.

    Raises:
        ConnectionError: the hub cannot be reached.
        FileNotFoundError: `model.name` is a path that does not exist.
        ValueError: what is there is no text-to-image pipeline, or is incomplete.
    """
    check_diffusion_model(model)
    from diffusers import DiffusionPipeline

    place = str(tiny_diffusion.FOLDER) if model.source == "tiny_sd" else model.name
    local = Path(place).is_dir()
    with silent(), _one_line(place, local, "pipeline", _LOCAL):
        parts = DiffusionPipeline.load_config(place, local_files_only=local)
        options = {"requires_safety_checker": False} if "requires_safety_checker" in parts else {}
        if "safety_checker" in parts:
            options["safety_checker"] = None
        pipeline = DiffusionPipeline.from_pretrained(
            place,
            dtype=getattr(torch, model.dtype),
            use_safetensors=True,
            local_files_only=local,
            **options,
        )
    needed = inspect.signature(pipeline.__call__).parameters
    if "prompt" not in needed or any(p in needed for p in ("image", "mask_image", "video")):
        raise ValueError(f"{place} is no text-to-image pipeline but {type(pipeline).__name__}")
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            _check_weights(f"{place}: {name}", part)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_clip(model: DiffusionModelConfig) -> tuple["CLIPModel", "CLIPProcessor"]:
    """The CLIP that scores pictures, in float32 on the CPU, and its processor.

    Raises:
        ConnectionError: the hub cannot be reached.
        FileNotFoundError: `model.clip` is a path that does not exist.
        ValueError: what is there is no CLIP, or is incomplete.
    """
    check_diffusion_model(model)
    from transformers import CLIPModel, CLIPProcessor

    place = model.clip or str(tiny_diffusion.FOLDER / tiny_diffusion.CLIP)
    local = Path(place).is_dir()
    options = {"local_files_only": local}
    with silent(), _one_line(place, local, "CLIP", _LOCAL_CLIP):
        clip, found = CLIPModel.from_pretrained(
            place, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
        )
        processor = CLIPProcessor.from_pretrained(place, **options)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{place} lacks {len(missing)} tensors of a CLIP: {missing[0]}, ...")
    _check_weights(place, clip)
    return clip.eval().requires_grad_(False), processor


def _check_weights(where: str, module: nn.Module) -> None:
    """Refuse weights that are missing or not finite."""
    module.eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"{where} lacks the weights of {name}")
        if not parameter.isfinite().all():
            raise ValueError(f"{where}: {name} holds values that are not finite")


@contextmanager
def _one_line(place: str, local: bool, what: str, instead: str) -> Iterator[None]:
    """Say in one line what is wrong with a folder, or that the hub cannot be reached."""
    try:
        yield
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        reason = first_line(error)
        if local:
            raise ValueError(f"{place} is no complete {what}: {reason}") from error
        raise ConnectionError(
            f"the hub can't be reached for the {what} {place} ({reason}): {instead}"
        ) from error


@contextmanager
def silent() -> Iterator[None]:
    """Silence what diffusers and transformers say that is no error: bars and advice."""
    from diffusers.utils import logging

    level: Any = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with quiet():
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
