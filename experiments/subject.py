"""What a run compresses and how it is evaluated, whatever kind of network it is."""

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from experiments.config import Config
from experiments.machine import versions
from jlcm.architecture import Architecture
from jlcm.select import Filter


class Subject(Protocol):
    """A network with its data.

    Attributes:
        module: the original network, in evaluation mode.
        architecture: builds the same network without its weights.
        filter_fn: which layers are compressed.
        example_inputs: one batch that the network accepts; None where orders of neurons are not
            propagated.
    """

    module: nn.Module
    architecture: Architecture
    filter_fn: Filter
    example_inputs: Tensor | None

    def calibration(self) -> Tensor:
        """The unlabelled inputs that learning looks at, (n, ...)."""

    def original(self) -> dict[str, Any]:
        """Results of the original network by metric, kept for all runs of a sweep."""

    def packed(self, module: nn.Module) -> dict[str, Any]:
        """Results of a compressed network, and how far it is from the original."""


def original_path(config: Config, identity: dict[str, Any], suffix: str, *packages: str) -> Path:
    """Where the original network's results are kept for all runs of a sweep.

    Args:
        config: the whole configuration.
        identity: the part of it that decides the result.
        suffix: of the file.
        packages: whose versions matter beside those that every record has.
    """
    what = {key: identity[key] for key in ("model", "data", "seed")} | versions(*packages)
    name = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
    return Path(config.results_dir) / "originals" / f"{name}{suffix}"
