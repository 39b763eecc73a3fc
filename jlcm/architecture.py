"""How a packed file names the network that its weights belong to."""

import importlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from jlcm.pipeline import PipelineNetwork

#: Packages whose functions a packed file may call, directly or through the package above. A file
#: from elsewhere must not run arbitrary code: `jlcm.load` refuses every other builder.
TRUSTED_PACKAGES = (
    "torchvision.models",
    "timm.models",
    "transformers.models",
    "diffusers.models",
    "diffusers.pipelines",
)
#: Keys of a configuration that name code outside transformers, or say what wrote which weights.
_LEFT_OUT = (
    "architectures",
    "auto_map",
    "quantization_config",
    "transformers_version",
    "transformers_weights",
)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A function or class that builds the network, with its arguments.

    Attributes:
        builder: "module:function", for instance "torchvision.models:resnet18", or one of
            transformers' model classes or auto classes, "transformers:LlamaForCausalLM".
        arguments: keyword arguments of the function, JSON types only; for transformers
            {"config": ...}, what the configuration's `to_dict` returns, and for a pipeline of
            diffusers {"components": {name: {"builder": ..., "arguments": ...}, ...}}.

    Raises:
        ValueError: for a builder outside torchvision, timm, transformers and diffusers, or for
            arguments of other types.
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

    @classmethod
    def of_transformers(cls, model: nn.Module) -> "Architecture":
        """How to build a model of transformers again.

        `jlcm.save` does this itself; nothing of the configuration's origin is kept.

        Raises:
            ValueError: if the class is not one of transformers' own.
        """
        kind = next(k for k in type(model).__mro__ if not k.__module__.startswith("jlcm."))
        exported = hasattr(importlib.import_module("transformers"), kind.__name__)
        if not (exported and kind.__module__.startswith("transformers.models.")):
            raise ValueError(f"{kind.__name__} is not a model class of transformers itself")
        config = json.loads(json.dumps(_plain_config(model.config.to_dict()), sort_keys=True))
        return cls(builder=f"transformers:{kind.__name__}", arguments={"config": config})

    @classmethod
    def of_pipeline(cls, pipeline: Any, components: Sequence[str]) -> "Architecture":
        """How to build the network of a pipeline of diffusers again (`jlcm.pipeline_network`).

        Args:
            pipeline: the pipeline.
            components: names of the components that the network has.

        Raises:
            ValueError: if a class is not one of diffusers' or transformers' own.
        """
        described = {name: asdict(_of_component(getattr(pipeline, name))) for name in components}
        kind, diffusers = type(pipeline).__name__, importlib.import_module("diffusers")
        builder = f"diffusers:{kind if hasattr(diffusers, kind) else 'DiffusionPipeline'}"
        return cls(builder=builder, arguments={"components": described})

    def build(self, device: str = "meta") -> nn.Module:
        """Build the network in evaluation mode.

        Args:
            device: "meta" allocates no weights. Constructors that need real numbers fall back
                to the CPU.

        Returns:
            The network; its parameters hold no trained values.

        Raises:
            ValueError: the builder is no function of its package, or the arguments do not fit.
        """
        build = self._builder()
        try:
            with torch.device(device):
                model = build().eval()
            if device != "meta" or not unregistered_meta(model):
                return model
        except (NotImplementedError, RuntimeError):
            if device != "meta":
                raise
        return build().eval()

    def _builder(self) -> Callable[[], nn.Module]:
        module, _, function = self.builder.partition(":")
        build = getattr(importlib.import_module(module), function)
        # Trusted packages import functions from elsewhere, which are reachable through them.
        if not callable(build) or not _trusted(getattr(build, "__module__", None) or ""):
            raise ValueError(f"architecture builder {self.builder!r} is no function of its package")
        library = module.partition(".")[0]
        if library == "diffusers" and "components" in self.arguments:
            return _from_components(build, **self.arguments)
        if library in ("transformers", "diffusers"):
            return _from_config(build, **self.arguments)
        return partial(build, **self.arguments)

    def model_class(self) -> type[nn.Module]:
        """The class of transformers that the builder names.

        Raises:
            ValueError: if it names none.
        """
        import transformers

        kind = getattr(transformers, self.builder.partition(":")[2], None)
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
            raise ValueError(f"{self.builder!r} is no model class of transformers")
        return kind


def _from_config(kind: type, config: dict[str, Any]) -> Callable[[], nn.Module]:
    """A call that builds a model of transformers from the plain form of its configuration."""
    from transformers import CONFIG_MAPPING, PreTrainedModel
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    config = _plain_config(config)
    if hasattr(kind, "load_config"):  # diffusers
        return _from_diffusers(kind, config)
    if isinstance(kind, type) and issubclass(kind, PreTrainedModel):
        config_class, build = kind.config_class, kind._from_config
    elif isinstance(kind, type) and issubclass(kind, _BaseAutoModelClass):
        config_class = CONFIG_MAPPING[config["model_type"]]
        build = partial(kind.from_config, trust_remote_code=False)
    else:
        raise ValueError(f"{kind.__name__} is no model class of transformers")
    if not _trusted(config_class.__module__):
        raise ValueError(f"{config_class.__name__} is no configuration of transformers itself")
    return lambda: build(config_class.from_dict(config))


def _from_diffusers(kind: type, config: dict[str, Any]) -> Callable[[], nn.Module]:
    """A call that builds a model of diffusers from the plain form of its configuration."""
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ValueError(f"{kind.__name__} is no model class of diffusers")
    return lambda: kind.from_config(config)


def _from_components(kind: type, components: dict[str, Any]) -> Callable[[], nn.Module]:
    """A call that builds the network of a pipeline of diffusers."""
    if not (isinstance(kind, type) and hasattr(kind, "register_modules")):
        raise ValueError(f"{kind.__name__} is no pipeline class of diffusers")
    builders = {name: Architecture(**parts)._builder() for name, parts in components.items()}
    return lambda: PipelineNetwork({name: build() for name, build in builders.items()})


def _of_component(module: nn.Module) -> Architecture:
    """How to build a component of a pipeline."""
    kind = next(k for k in type(module).__mro__ if not k.__module__.startswith("jlcm."))
    if kind.__module__.startswith("transformers."):
        return Architecture.of_transformers(module)
    if not _trusted(kind.__module__):
        raise ValueError(f"{kind.__name__} is not a class of diffusers itself")
    public = hasattr(importlib.import_module("diffusers"), kind.__name__)
    where = "diffusers" if public else kind.__module__
    config = module.config if isinstance(module.config, dict) else module.config.to_dict()
    config = json.loads(json.dumps(_plain_config(dict(config)), sort_keys=True))
    return Architecture(builder=f"{where}:{kind.__name__}", arguments={"config": config})


def _plain_config(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what is private, or could name code that is not transformers' own.

    Attention and experts may be implemented by kernels that are fetched; the usual ones are chosen
    in their place.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(item) for item in value]
        return _plain_config(value) if isinstance(value, dict) else value

    return {
        key: plain(value)
        for key, value in config.items()
        if not (key in _LEFT_OUT or re.match(r"_|.*_implementation$", str(key)))
    }


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
