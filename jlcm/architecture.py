"""How a packed file names the network that its weights belong to."""

import importlib
import json
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

#: Packages whose functions a packed file may call, directly or through the package above. A file
#: from elsewhere must not run arbitrary code: `jlcm.load` refuses every other builder.
TRUSTED_PACKAGES = ("torchvision.models", "timm.models")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A function that builds the network, with its arguments.

    Attributes:
        builder: "module:function", for instance "torchvision.models:resnet18".
        arguments: keyword arguments of the function, JSON types only.

    Raises:
        ValueError: for a builder outside torchvision and timm, or arguments of other types.
    """

    builder: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the form of the reference, before anything is imported."""
        module = self.builder.partition(":")[0]
        if self.builder.count(":") != 1 or not module:
            raise ValueError(
                f"architecture builder {self.builder!r} is not of the form 'module:function'"
            )
        if not _trusted(module) and f"{module}.models" not in TRUSTED_PACKAGES:
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

        Raises:
            ValueError: the builder is no function of its package.
        """
        module, _, function = self.builder.partition(":")
        build = getattr(importlib.import_module(module), function)
        # Trusted packages import functions from elsewhere, which are reachable through them.
        if not callable(build) or not _trusted(getattr(build, "__module__", None) or ""):
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


def _trusted(module: str) -> bool:
    return any(module == p or module.startswith(f"{p}.") for p in TRUSTED_PACKAGES)


def unregistered_meta(model: nn.Module) -> list[str]:
    """Names of meta tensors that are plain attributes: no file holds their values."""
    return [
        f"{name}.{attribute}".lstrip(".")
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if isinstance(value, Tensor) and value.is_meta
    ]
