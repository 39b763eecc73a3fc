"""Language models as subjects of runs: calibration text, perplexity, common-sense questions."""

import json
from typing import Any

import torch
from torch import Tensor, nn

from experiments.config import Config
from experiments.data.text import calibration_windows, check_text, evaluation_windows
from experiments.evaluate.language import check_commonsense, commonsense, perplexity_and_kl
from experiments.models.language import (
    check_language_model,
    decoder_filter,
    load_language_model,
)
from experiments.subject import original_path
from jlcm.config import Invalid, check_choice
from jlcm.files import replacing
from jlcm.learning.forward import PRECISIONS
from jlcm.locks import once

EMBEDDINGS = ("fp16", "compressed")


def check_language(config: Config) -> None:
    """Check options and files before anything is fetched.

    Raises:
        ValueError, OSError: naming the option.
    """
    check_language_model(config.model)
    check_choice("model.embeddings", config.model.embeddings, EMBEDDINGS)
    check_text(config.data)
    check_choice("data.precision", config.data.precision, PRECISIONS)
    check_commonsense(config.data.tasks)
    if config.encoding.first_last != "same":
        raise Invalid("encoding.first_last=int8 is a convention for networks of images")


class LanguageSubject:
    """A causal language model and its texts (`experiments.subject.Subject`)."""

    architecture = None  # jlcm.save finds out what transformers needs
    example_inputs = torch.zeros(1, 8, dtype=torch.int64)  # only to trace the decoder layers with

    def __init__(self, config: Config, identity: dict[str, Any], device: torch.device) -> None:
        """Load the model and its tokenizer, and cut the evaluation text.

        Args:
            config: the whole configuration.
            identity: the part of it that decides the result.
            device: where the model runs.

        Raises:
            ValueError, OSError: for a model or text that cannot be had.
        """
        self._model = load_language_model(config.model)
        self._windows = evaluation_windows(config.data, self._model)
        self._config, self._device = config, device
        self._path = original_path(config, identity, ".json", "transformers", "lm_eval")
        self.module = self._model.module
        self.filter_fn = decoder_filter(self.module, config.model.embeddings)

    def calibration(self) -> Tensor:
        """Token ids (samples, length) of a text, or of what the model writes."""
        return calibration_windows(
            self._config.data, self._model, seed=self._config.seed, device=self._device
        )

    def original(self) -> dict[str, Any]:
        """Questions and perplexity of the original model, kept for all runs of a sweep."""
        with once(self._path, again=self._config.force) as missing:
            if missing:
                module = self.module.to(self._device)
                text = perplexity_and_kl(module, None, self._windows, device=self._device)
                results = text["packed"] | self._questions(module)
                with replacing(self._path) as temporary:
                    temporary.write_text(json.dumps(results))
        return json.loads(self._path.read_text())

    def packed(self, module: nn.Module) -> dict[str, Any]:
        """The same of a compressed model, and its distance from the original."""
        original = self.module.to(self._device)
        text = perplexity_and_kl(module, original, self._windows, device=self._device)
        return text["packed"] | {"tokens": text["tokens"]} | self._questions(module)

    def _questions(self, module: nn.Module) -> dict[str, Any]:
        """Accuracy of each task in percent, and their mean; nothing without tasks."""
        data = self._config.data
        if not data.tasks:
            return {}
        found = commonsense(
            module,
            self._model.tokenizer,
            data.tasks,
            limit=data.limit,
            batch_size=self._config.compute.batch_size,
            device=self._device,
            precision=data.precision,
            hub=data.hub,
        )
        return {
            "samples": sum(found[task]["samples"] for task in data.tasks),
            "questions": found,
        }
