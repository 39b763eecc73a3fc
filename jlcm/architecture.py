"""How a packed file names the network that its weights belong to."""

import importlib
import json
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

#: Packages whose functions a packed file may call. A file from elsewhere must not be able to
#: run arbitrary code, so `jlcm.load` refuses every other builder unless it is given a model.
TRUSTED_PACKAGES = ("torchvision", "timm", "transformers", "diffusers", "jlcm")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A function that builds the network, with its arguments.

    Attributes:
        builder: "module:function", for instance "torchvision.models:resnet18".
        arguments: keyword arguments of the function, JSON types only.
    """

    builder: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the form of the reference, before anything is imported."""
        package = self.builder.partition(":")[0].partition(".")[0]
        if self.builder.count(":") != 1 or not package:
            raise ValueError(
                f"architecture builder {self.builder!r} is not of the form 'module:function'"
            )
        if package not in TRUSTED_PACKAGES:
            raise ValueError(
                f"architecture builder {self.builder!r} is not in {', '.join(TRUSTED_PACKAGES)}: "
                "build the model yourself and pass it as jlcm.load(path, model=...)"
            )
        try:
            same = json.loads(json.dumps(self.arguments)) == self.arguments
        except (TypeError, ValueError):
            same = False
        if not same:
            raise ValueError(f"architecture arguments {self.arguments} are not plain JSON types")

    def build(self, device: str = "meta") -> nn.Module:
        """Build the network in evaluation mode.

        Args:
            device: "meta" allocates no weights. Constructors that need real numbers fall back
                to the CPU.

        Returns:
            The network; its parameters hold no trained values.
        """
        module, _, function = self.builder.partition(":")
        build = getattr(importlib.import_module(module), function)
        # Trusted packages import functions from elsewhere, which are reachable through them.
        home = (getattr(build, "__module__", None) or "").partition(".")[0]
        if not callable(build) or home not in TRUSTED_PACKAGES:
            raise ValueError(f"architecture builder {self.builder!r} is no function of its package")
        try:
            with torch.device(device):
                model = build(**self.arguments).eval()
            if device != "meta" or not unregistered_meta(model):
                return model
        except (NotImplementedError, RuntimeError):
            if device != "meta":
                raise
        return build(**self.arguments).eval()


def unregistered_meta(model: nn.Module) -> list[str]:
    """Names of meta tensors that are plain attributes: no file holds their values."""
    return [
        f"{name}.{attribute}".lstrip(".")
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if isinstance(value, Tensor) and value.is_meta
    ]
