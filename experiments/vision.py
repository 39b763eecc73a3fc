"""Image classifiers as subjects of runs: calibration images, accuracy, divergence."""

from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

import jlcm
from experiments.config import Config
from experiments.data import load_data
from experiments.evaluate.vision import accuracy, distance, predict
from experiments.models import load_network
from experiments.subject import original_path
from jlcm.config import Invalid
from jlcm.files import replacing
from jlcm.locks import once


class Classifier:
    """A classifier and its images (`experiments.subject.Subject`)."""

    filter_fn = staticmethod(jlcm.linear_and_convolution)

    def __init__(self, config: Config, identity: dict[str, Any], device: torch.device) -> None:
        """Load or train the network and find its images.

        Args:
            config: the whole configuration.
            identity: the part of it that decides the result.
            device: where it is trained and evaluated.

        Raises:
            ValueError, OSError: as `load_network` and `load_data`.
        """
        network = load_network(config.model, config.data, seed=config.seed, device=device)
        self._data = load_data(
            config.data, network.preprocessing, classes=network.classes, seed=config.seed
        )
        self._config, self._device = config, device
        self._path = original_path(config, identity, ".safetensors")
        self.module, self.architecture = network.module, network.architecture
        self.example_inputs = torch.zeros(1, 3, *[network.preprocessing.crop] * 2)

    def calibration(self) -> Tensor:
        """Calibration images as one tensor; labels are left behind.

        Raises:
            Invalid: (a ValueError) there are none.
        """
        images = self._data.calibration
        if images is None:
            raise Invalid(
                "learning needs calibration images: set data.calibration_list, or learn=none"
            )
        return torch.stack([image for image, _ in tqdm(images, "calibration", leave=False)])

    def original(self) -> dict[str, Any]:
        """Accuracy of the original network; its outputs are kept for all runs of a sweep."""
        with once(self._path, again=self._config.force) as missing:
            if missing:
                logits, labels = self._predict(self.module.to(self._device), "original")
                with replacing(self._path) as temporary:
                    save_file({"logits": logits, "labels": labels}, temporary)
        kept = load_file(self._path)
        self._logits = kept["logits"]
        return accuracy(self._logits, kept["labels"])

    def packed(self, module: nn.Module) -> dict[str, Any]:
        """Accuracy of a compressed network and its divergence; the original comes before."""
        logits, labels = self._predict(module, "packed")
        return accuracy(logits, labels) | distance(self._logits, logits)

    def _predict(self, module: nn.Module, description: str) -> tuple[Tensor, Tensor]:
        return predict(
            module,
            self._data.test,
            device=self._device,
            batch_size=self._config.compute.batch_size,
            workers=self._config.compute.workers,
            description=description,
        )
