"""Causal language models of transformers, from SmolLM2's wheel, a local folder or the hub."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from experiments.config import LanguageModelConfig
from experiments.models.smollm2 import smollm2_folder
from jlcm.config import Invalid, check_choice
from jlcm.select import Filter, linear_and_convolution, with_embeddings

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

#: transformers' model types whose weights are all in linear layers and embeddings.
SUPPORTED = (
    "gemma", "gemma2", "gemma3_text", "gpt_neox", "granite", "llama", "mistral", "olmo", "olmo2",
    "opt", "phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2",
)  # fmt: skip
SOURCES = ("smollm2", "hf")
DTYPES = ("float32", "bfloat16", "float16")

_LOCAL_FOLDER = "model.name=FOLDER takes a local one instead"


@dataclass(kw_only=True)
class LanguageModel:
    """A trained causal language model.

    Attributes:
        module: a `PreTrainedModel` in evaluation mode, on the CPU, in the dtype asked for.
        tokenizer: turns text into ids of its vocabulary.
        name: for messages and records.
    """

    module: nn.Module
    tokenizer: "PreTrainedTokenizerBase"
    name: str


def check_language_model(model: LanguageModelConfig) -> None:
    """Check what needs neither a network nor weights.

    Raises:
        FileNotFoundError: `model.name` is a path that does not exist.
        Invalid: (a ValueError) for options, or where packages are missing.
    """
    check_choice("model.source", model.source, SOURCES)
    check_choice("model.dtype", model.dtype, DTYPES)
    if model.weights is not None:
        raise Invalid(f"model.weights={model.weights} is for vision networks: {_LOCAL_FOLDER}")
    # "owner/model" is a name on the hub, anything longer or absolute can only be a path.
    path = model.name.startswith(("/", ".", "~")) or model.name.count("/") > 1
    if model.source == "hf" and path and not Path(model.name).is_dir():
        raise FileNotFoundError(f"model.name={model.name} is not a folder with a language model")
    needed = (
        ("transformers", "accelerate", "gguf") if model.source == "smollm2" else ("transformers",)
    )
    if missing := [package for package in needed if find_spec(package) is None]:
        raise Invalid(
            f"model.source={model.source} needs {', '.join(missing)}: "
            "pip install -c constraints.txt -e '.[llm]'"
        )


def load_language_model(model: LanguageModelConfig) -> LanguageModel:
    """Load a model with its tokenizer. Only safetensors weights are read, and no code of a hub.

    Args:
        model: where it comes from, and its dtype.

    Returns:
        The model.

    Raises:
        ConnectionError: the hub or the package index cannot be reached.
        FileNotFoundError: `model.name` is a path that does not exist.
        ValueError: what is there is no supported causal language model, or is incomplete.
    """
    check_language_model(model)
    with quiet():
        if model.source == "smollm2":
            place, local = str(smollm2_folder()), True
        else:
            place, local = model.name, Path(model.name).is_dir()
        try:
            config = _read_config(place, local=local)
            _check_architecture(config, place)
            tokenizer = _read_tokenizer(place, local=local)
            module = _read_module(place, config, dtype=getattr(torch, model.dtype), local=local)
        except OSError as error:
            reason = str(error).strip().splitlines()[0]
            if local:
                raise ValueError(f"{place} is no complete language model: {reason}") from error
            raise ConnectionError(
                f"the hub can't be reached for model.name={place} ({reason}): {_LOCAL_FOLDER}"
            ) from error
    return LanguageModel(module=module, tokenizer=tokenizer, name=model.name)


def untrained_language_model(
    model: LanguageModelConfig, *, device: str, seed: int = 0
) -> nn.Module:
    """Build a model with random weights, for what does not depend on them.

    Args:
        model: its `shape`, or where a configuration comes from.
        device: "meta" allocates nothing.
        seed: of the weights.

    Raises:
        ConnectionError, FileNotFoundError, ValueError: as `load_language_model`.
    """
    check_language_model(model)
    from transformers import AutoConfig, AutoModelForCausalLM

    if model.shape is not None:
        config = AutoConfig.for_model(**model.shape)
    else:
        place = str(smollm2_folder()) if model.source == "smollm2" else model.name
        config = _read_config(place, local=Path(place).is_dir())
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def decoder_filter(module: nn.Module, embeddings: str) -> Filter:
    """Which layers of a language model are compressed.

    Args:
        module: the model.
        embeddings: "fp16" chooses the linear layers of the decoder, "compressed" the token
            embeddings and the output layer, too.
    """
    if embeddings == "compressed":
        return with_embeddings
    head = module.get_output_embeddings()
    name_of_head = next(name for name, part in module.named_modules() if part is head)
    return lambda part, name: name != name_of_head and linear_and_convolution(part, name)


def _read_config(place: str, *, local: bool) -> "PretrainedConfig":
    """Read the configuration; a hub that does not answer is noticed without retries."""
    from huggingface_hub import HfApi
    from transformers import AutoConfig

    with suppress(OSError):
        return _known_type(AutoConfig, place, local_files_only=True)
    if not local:
        try:
            HfApi().model_info(place, timeout=30)
        except Exception as error:  # of httpx or of the hub: no connection, no such model, no right
            raise OSError(str(error).strip() or type(error).__name__) from error
    return _known_type(AutoConfig, place, local_files_only=local)


def _known_type(factory: Any, place: str, **options: Any) -> "PretrainedConfig":
    """Read a configuration whose model type transformers knows."""
    try:
        return factory.from_pretrained(place, trust_remote_code=False, **options)
    except ValueError as error:
        raise ValueError(
            f"{place} is no model that transformers knows "
            f"({str(error).strip().splitlines()[0].rstrip('.')}): "
            f"supported are {', '.join(SUPPORTED)}"
        ) from error


def _check_architecture(config: "PretrainedConfig", place: str) -> None:
    """Refuse what is no causal language model, or one whose layers are not compressed."""
    architectures = config.architectures or []
    if architectures and not any(
        name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures
    ):
        raise ValueError(f"{place} is no causal language model but {', '.join(architectures)}")
    if config.model_type not in SUPPORTED:
        raise ValueError(
            f"{place} is of type {config.model_type}, supported are {', '.join(SUPPORTED)}"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{place} is quantised already: compression needs 16- or 32-bit weights")


def _read_tokenizer(place: str, *, local: bool) -> "PreTrainedTokenizerBase":
    """Read the tokenizer, which some folders lack."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False, local_files_only=local)
    except (ValueError, ImportError, KeyError, TypeError) as error:
        raise ValueError(
            f"{place} has no tokenizer that transformers can read (tokenizer.json, "
            "tokenizer_config.json)"
        ) from error


def _read_module(
    place: str, config: "PretrainedConfig", *, dtype: torch.dtype, local: bool
) -> nn.Module:
    """Read the weights; all of them must be there, and finite."""
    from transformers import AutoModelForCausalLM

    try:
        module, found = AutoModelForCausalLM.from_pretrained(
            place,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=local,
            output_loading_info=True,
        )
    except (SafetensorError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"the weights of {place} cannot be loaded: {reason}") from error
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{place} lacks {len(missing)} tensors of the model: {missing[0]}, ...")
    for name, parameter in module.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"{place}: {name} holds values that are not finite in {dtype}")
    return module.eval().requires_grad_(False)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what transformers and the hub say that is no error: bars, advice, retries."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging as transformers

    bars = transformers.is_progress_bar_enabled()
    levels = transformers.get_verbosity(), hub.get_verbosity()
    transformers.disable_progress_bar()
    transformers.set_verbosity(logging.ERROR)
    hub.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers.set_verbosity(levels[0])
        hub.set_verbosity(levels[1])
        if bars:
            transformers.enable_progress_bar()
