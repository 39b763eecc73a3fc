"""From a configuration to the call that compresses, every option checked before long work."""

from dataclasses import asdict
from functools import partial
from typing import Any

from torch import nn

import jlcm
from experiments.config import (
    TASKS,
    CommonsenseConfig,
    Config,
    DiffusionModelConfig,
    DigitsConfig,
    ImageConfig,
    LanguageModelConfig,
    LearnConfig,
    PromptsConfig,
)
from jlcm.compress import check_trellis
from jlcm.config import (
    ALLOCATIONS,
    FIRST_LAST,
    REORDERINGS,
    ROTATIONS,
    Invalid,
    check_alpha,
    check_choice,
)
from jlcm.quantize import METHODS

#: Methods that the groups init, encoding, reorder and learn belong to.
OURS = ("jlcm", "jlcm_init")
#: Part of the bytes that rex.outliers=auto spends on outliers.
AUTO_OUTLIERS = 0.05


def check_options(config: Config) -> None:
    """Check every option of the run that is no option of the method and needs no data.

    Raises:
        Invalid: (a ValueError) naming the option and the valid choices.
    """
    check_choice("task", config.task, TASKS)
    check_alpha(config.alpha)
    check_choice("output", config.output, ("table", "json"))
    if config.compute.batch_size < 1 or config.compute.workers < 0:
        raise Invalid("compute.batch_size must be at least 1 and compute.workers at least 0")
    if config.compute.threads is not None and config.compute.threads < 1:
        raise Invalid(f"compute.threads={config.compute.threads} must be at least 1, or null")
    if config.data.limit is not None and config.data.limit < 1:
        raise Invalid(f"data.limit={config.data.limit} must be at least 1, or null for all samples")
    match config.model:
        case LanguageModelConfig():
            kind, own, needed = "language models", CommonsenseConfig, "commonsense"
        case DiffusionModelConfig():
            kind, own, needed = "text-to-image pipelines", PromptsConfig, "prompts"
        case _:
            kind, needed = "networks of images", "digits, imagenet or image_list"
            own = DigitsConfig | ImageConfig
    if not isinstance(config.data, own):
        raise Invalid(f"data={config.data.kind} is not for {kind}: set data={needed}")


def compressor(config: Config) -> partial:
    """What compresses, with all options of the method; the network and the data are missing.

    Raises:
        Invalid: (a ValueError) for an option that does not exist or is out of range.
    """
    name = config.method.name
    check_choice("method", name, (*OURS, *METHODS))
    check_choice("encoding.first_last", config.encoding.first_last, FIRST_LAST)
    own = config.method.outliers
    outliers = _outliers(config.rex.outliers if own is None else own)
    if name in OURS:
        if config.method.options or config.method.bits is not None:
            raise Invalid(f"method={name} has no options of its own: see init, encoding and learn")
        return partial(jlcm.compress, **compress_options(config), outliers=outliers)
    given = _tuples(config.method.options)
    if outliers:
        if name != "rex":
            raise Invalid(f"rex.outliers needs method=jlcm, jlcm_init or rex, not {name}")
        given = {"outliers": outliers} | given
    try:
        options = METHODS[name].options(**given)
    except TypeError as error:  # an unknown field of the dataclass
        raise Invalid(f"method: {error}") from error
    bits, ends = config.method.bits, config.encoding.first_last
    return partial(_quantize, method=name, options=options, bits=bits, first_last=ends)


def compress_options(config: Config) -> dict[str, Any]:
    """Arguments of `jlcm.compress`: encoding, initialisation, order, and the stages of learning.

    Raises:
        Invalid: (a ValueError) for an option that does not exist or is out of range.
    """
    chosen = config.learn if config.method.name == "jlcm" else LearnConfig()
    check_choice("reorder", config.reorder.mode, REORDERINGS)
    check_choice("learn.allocation", chosen.allocation, ALLOCATIONS)
    if chosen.rotation is not None:
        check_choice("learn.rotation", chosen.rotation, ROTATIONS)
    if chosen.importance is not None:
        check_choice("learn.importance", chosen.importance, ("fisher",))
    try:
        learn = jlcm.Learn(kind=chosen.kind, **_tuples(chosen.options))
        blocks = None if chosen.blocks is None else jlcm.Blocks(**_tuples(chosen.blocks))
        distill = None if chosen.distill is None else jlcm.Distill(**_tuples(chosen.distill))
    except TypeError as error:  # an unknown field of the dataclass
        raise Invalid(f"learn: {error}") from error
    encoding = jlcm.Encoding(
        kind=config.encoding.kind,
        budget=config.encoding.budget,
        fold_bn=config.encoding.fold_bn,
        first_last=config.encoding.first_last,
        refit_scales=config.encoding.refit_scales,
    )
    check_trellis(encoding, learn, blocks, distill)
    return {
        "init": jlcm.Init(method=config.init.method, features=config.init.features),
        "encoding": encoding,
        "reorder": config.reorder.mode,
        "importance": chosen.importance,
        "allocation": chosen.allocation,
        "rotation": chosen.rotation,
        "learn": None if learn.kind == "none" else learn,
        "blocks": blocks,
        "distill": distill,
    }


def stages_of(options: dict[str, Any]) -> dict[str, Any]:
    """All options of the stages that run, defaults included, for the record."""
    names = ("learn", "blocks", "distill", "options")
    return {name: asdict(options[name]) for name in names if options.get(name) is not None}


def _quantize(module: nn.Module, *, example_inputs, folder, **options) -> nn.Module:
    # The compared methods trace without inputs, and keep nothing to go on from.
    return jlcm.quantize(module, **options)


def _outliers(value: Any) -> float:
    """Part of the bytes that goes to outliers."""
    if value is None or value == "auto":
        return AUTO_OUTLIERS if value else 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise Invalid(f"rex.outliers={value} must be a part between 0 and 1, auto or null")
    return float(value)


def needs_calibration(config: Config) -> bool:
    """Whether the method looks at calibration images."""
    if config.method.name in METHODS:
        return METHODS[config.method.name].needs_inputs
    learn = config.learn if config.method.name == "jlcm" else LearnConfig()
    plain = learn.allocation == "uniform" and learn.importance is None
    return not (plain and learn.kind == "none" and learn.blocks is None and learn.distill is None)


def _tuples(options: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
