"""Calibration of pipelines of diffusers: calls of their components while they generate images."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten
from tqdm import tqdm

from jlcm.layers import computing_dtype
from jlcm.pipeline import Call, Format, Leaf, Link, PipelineNetwork, returned_tensors, role

#: Integers up to here are exact in float32.
_EXACT = 2**24
#: Order in which components run.
_ROLES = ("text", "denoiser", "vae")
#: Arguments of pipelines that are texts, one for each prompt.
_TEXTS = ("negative_prompt", "negative_prompt_2", "negative_prompt_3")
_PRIME = 1_000_003


@torch.no_grad()
def record_calls(
    pipeline: Any,
    network: PipelineNetwork,
    prompts: Sequence[str],
    *,
    steps: int = 25,
    guidance_scale: float = 7.5,
    seed: int = 0,
    batch_size: int = 8,
    per_prompt: int = 1,
    weights: dict[str, float] | None = None,
    progress: bool = True,
    **arguments: Any,
) -> Tensor:
    """Calibration inputs of a pipeline's network: calls of its components for some prompts.

    The pipeline generates an image for each prompt. Of each image one call of the denoiser is kept,
    at a random timestep (stratified over all samples), half of them with the prompt and half
    without where guidance needs both; the call of each text encoder that belongs to it; and the
    latent that the VAE decodes.

    Args:
        pipeline: the original.
        network: of `pipeline_network`; the format of its inputs is set (`network.format`).
        prompts: calibration prompts.
        steps: of the scheduler.
        guidance_scale: as the pipeline takes it; without guidance (1) all calls are conditional.
        seed: of noise and choices.
        batch_size: prompts at a time; the noise does not depend on it.
        per_prompt: samples of each prompt, at different timesteps.
        weights: what the error of each component counts, by its name; 1 for those left out.
        progress: show a progress bar.
        arguments: further ones of the pipeline, such as `height`, `width`, `negative_prompt`.

    Returns:
        (prompts * per_prompt, features) float32, on the CPU; samples of a prompt one after another.

    Raises:
        ValueError: no prompts, a component that is not called, or calls that differ in more than
            the values of tensors.
    """
    names = sorted(filter(role, network.components), key=lambda n: _ROLES.index(role(n)))
    weights = _check(pipeline, prompts, names, weights or {}, batch_size, per_prompt)
    recorder = _Recorder(pipeline, len(prompts) * per_prompt, seed)
    bar = tqdm(total=len(prompts), desc="record", unit="prompt", disable=not progress, leave=False)
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        given = {key: _of_batch(key, value, start, batch) for key, value in arguments.items()}
        first = seed * _PRIME + start
        noise = [torch.Generator().manual_seed(first + i) for i in range(len(batch))]
        with _watching(pipeline, names) as seen, _quiet(pipeline):
            pipeline(
                prompt=batch,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                generator=noise,
                output_type="pt",
                **given,
            )
        if silent := [name for name in names if not seen[name]]:
            raise ValueError(
                f"the pipeline does not call {', '.join(silent)}: leave it out of components="
            )
        for index in range(len(batch) * per_prompt):
            recorder.add(seen, index // per_prompt, len(batch))
        bar.update(len(batch))
    bar.close()
    calls, format_ = recorder.table()
    original = PipelineNetwork({name: getattr(pipeline, name) for name in names})
    original.format = format_
    network.format = _scaled(original, calls, weights, batch_size)
    return calls


@dataclass(frozen=True)
class _Seen:
    """One call of a component: leaves of its arguments, what it returned, and its samples."""

    method: str
    leaves: list[Any]
    structure: TreeSpec
    outputs: list[Tensor]
    rows: int


class _Recorder:
    """Turns calls into rows of a table, one after another."""

    def __init__(self, pipeline: Any, samples: int, seed: int) -> None:
        self.pipeline, self.samples = pipeline, samples
        generator = torch.Generator().manual_seed(seed)
        # Ranks say which part of the timesteps a sample is from, and whether it has the prompt.
        self.ranks = torch.randperm(samples, generator=generator).tolist()
        self.places = torch.rand(samples, generator=generator).tolist()
        self.calls: dict[str, Call] = {}
        self.links: dict[int, tuple[tuple[str, int], ...]] = {}
        self.rows: list[tuple[list[Tensor], set[int]]] = []

    def add(self, seen: dict[str, list[_Seen]], prompt: int, prompts: int) -> None:
        """Choose a sample of one of the prompts that were generated together."""
        rank, place = self.ranks[len(self.rows)], self.places[len(self.rows)]
        encoders = {name: calls for name, calls in seen.items() if role(name) == "text"}
        denoiser = next((name for name in seen if role(name) == "denoiser"), None)
        chosen: dict[str, tuple[_Seen, int]] = {}
        linked: set[int] = set()
        text = rank
        if denoiser is not None:
            calls = seen[denoiser]
            kinds = calls[0].rows // prompts  # with the prompt and without
            if calls[0].rows % prompts or not kinds:
                raise ValueError(
                    f"{denoiser} is called with {calls[0].rows} rows for {prompts} prompts"
                )
            strata = -(-self.samples // kinds)
            step = min(int(len(calls) * (rank // kinds + place) / strata), len(calls) - 1)
            chosen[denoiser] = calls[step], (rank % kinds) * prompts + prompt
            linked, found = self._link(_row(*chosen[denoiser]), encoders, prompt)
            text = rank % kinds if found is None else found
        for name, calls in encoders.items():
            call = calls[text % len(calls)]
            chosen[name] = call, prompt % call.rows
        for name in seen:
            if name not in chosen:
                chosen[name] = seen[name][-1], prompt % seen[name][-1].rows
        values = []
        for name in seen:
            self._check_format(name, chosen[name][0])
            row = _row(*chosen[name])
            for leaf, value in zip(self.calls[name].leaves, row, strict=True):
                if isinstance(leaf, Leaf):
                    values.append(_as_float(name, value))
        self.rows.append((values, linked))

    def table(self) -> tuple[Tensor, Format]:
        """All rows, and their format."""
        links = tuple(Link(leaf, parts) for leaf, parts in self.links.items())
        used: dict[str, set[int]] = {}
        for link in links:
            for name, place in link.parts:
                used.setdefault(name, set()).add(place)
        calls = {
            name: replace(call, outputs=tuple(sorted(used.get(name, {0}))))
            for name, call in self.calls.items()
        }
        flags = [[float(link.leaf in linked) for link in links] for _, linked in self.rows]
        values = torch.stack([torch.cat(values) for values, _ in self.rows])
        return torch.cat([values, torch.tensor(flags)], 1), Format(calls, links)

    def _link(
        self, row: list[Any], encoders: dict[str, list[_Seen]], prompt: int
    ) -> tuple[set[int], int | None]:
        """Leaves of the denoiser that text encoders returned, and in which of their calls."""
        linked: set[int] = set()
        for index in range(max(map(len, encoders.values()), default=0)):
            returned = {
                (name, place): output[prompt % calls[index].rows]
                for name, calls in encoders.items()
                if index < len(calls)
                for place, output in enumerate(calls[index].outputs)
                if output.dim() > 1 and len(output) == calls[index].rows
            }
            for leaf, value in enumerate(row):
                if isinstance(value, Tensor) and value.dim() and value.is_floating_point():
                    known = self.links.get(leaf)
                    pieces = returned if known is None else {k: returned.get(k) for k in known}
                    parts = _joined(value, pieces)
                    if parts is not None and parts == (known or parts):
                        self.links[leaf] = parts
                        linked.add(leaf)
            if linked:
                return linked, index
        return linked, None

    def _check_format(self, name: str, seen: _Seen) -> None:
        dtype, leaves = computing_dtype(getattr(self.pipeline, name)), []
        for value in seen.leaves:
            if isinstance(value, Tensor) and (not value.dim() or len(value) == seen.rows):
                kind = None if value.dtype == dtype else value.dtype
                value = Leaf(tuple(value.shape[1:]), kind)
            leaves.append(value)
        first = self.calls.setdefault(name, Call(seen.method, seen.structure, tuple(leaves)))
        same = first.structure == seen.structure and all(map(_same, first.leaves, leaves))
        if not same:
            raise ValueError(
                f"calls of {name} differ in more than the values of tensors with a row for each "
                "sample: they cannot be recorded"
            )


def _of_batch(key: str, value: Any, start: int, batch: list[str]) -> Any:
    """An argument of the pipeline for some of the prompts."""
    if key not in _TEXTS or value is None:
        return value
    return [value] * len(batch) if isinstance(value, str) else value[start : start + len(batch)]


def _row(seen: _Seen, row: int) -> list[Any]:
    """Leaves of one sample of a call."""
    return [
        value[row]
        if isinstance(value, Tensor) and value.dim() and len(value) == seen.rows
        else value
        for value in seen.leaves
    ]


def _joined(value: Tensor, pieces: dict[Any, Tensor | None]) -> tuple[Any, ...] | None:
    """Keys of the pieces that make up a tensor, bit for bit, side by side in the last dimension."""
    parts, rest = [], value
    while rest.shape[-1]:
        for key, piece in pieces.items():
            width = 0 if piece is None or not piece.dim() else piece.shape[-1]
            start = rest[..., :width]
            if width and piece.shape == start.shape and torch.equal(piece.to(value.dtype), start):
                parts.append(key)
                rest = rest[..., width:]
                break
        else:
            return None
    return tuple(parts) or None


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        both = isinstance(one, Tensor) and isinstance(other, Tensor)
        return both and one.shape == other.shape and torch.equal(one, other)
    return one is other or one == other


def _as_float(name: str, value: Tensor) -> Tensor:
    """(values,) float32, from which the tensor can be made again."""
    if not value.is_floating_point() and value.numel() and int(value.abs().max()) > _EXACT:
        raise ValueError(f"{name} is given integers beyond 2^24, which float32 cannot hold")
    return value.reshape(-1).float()


def _scaled(
    network: PipelineNetwork, calls: Tensor, weights: dict[str, float], batch_size: int
) -> Format:
    """The format with scales that make errors relative to the variance of the outputs."""
    sums: dict[str, list[list[Any]]] = {}
    for batch in calls.split(batch_size):
        device = next(network.buffers(), next(network.parameters(), batch)).device
        for name, outputs in network.run(batch.to(device)):
            parts = [outputs[place] for place in network.format.calls[name].outputs]
            found = [(p.numel(), p.double().sum(), p.double().square().sum()) for p in parts]
            sums.setdefault(name, []).append(found)
    scaled = {}
    for name, call in network.format.calls.items():
        scales = []
        for part in zip(*sums[name], strict=True):
            count, total, squared = (float(sum(values)) for values in zip(*part, strict=True))
            variance = squared / count - (total / count) ** 2
            if not 0 < variance < float("inf"):
                raise ValueError(f"outputs of {name} are constant, NaN or infinite")
            each = count / len(calls) * len(call.outputs)
            scales.append((weights[name] / variance / each) ** 0.5)
        outputs = call.outputs if weights[name] else ()
        scaled[name] = replace(call, outputs=outputs, scales=tuple(scales[: len(outputs)]))
    return replace(network.format, calls=scaled)


def _check(pipeline, prompts, names, weights, batch_size, per_prompt) -> dict[str, float]:
    """Weights of all components."""
    if isinstance(prompts, str) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise ValueError("prompts must be a list of texts, one at least")
    if batch_size < 1 or per_prompt < 1:
        raise ValueError("batch_size and per_prompt must be at least 1")
    for name in names:
        if not isinstance(getattr(pipeline, name, None), nn.Module):
            raise ValueError(f"{type(pipeline).__name__} has no component {name}")
    if not names:
        raise ValueError("the network has no text encoder, denoiser or VAE to record")
    if unknown := sorted(weights.keys() - set(names)):
        raise ValueError(f"weights name {', '.join(unknown)}: choose among {', '.join(names)}")
    weights = {name: float(weights.get(name, 1.0)) for name in names}
    if not all(0 <= w < float("inf") for w in weights.values()) or not any(weights.values()):
        raise ValueError(f"weights={weights} must not be negative, and not all be 0")
    return weights


@contextmanager
def _watching(pipeline: Any, names: Sequence[str]) -> Iterator[dict[str, list[_Seen]]]:
    """Keep all calls of components, on the CPU."""
    seen: dict[str, list[_Seen]] = {name: [] for name in names}

    def keep(name: str, method: str, args: tuple, kwargs: dict, output: Any) -> None:
        leaves, structure = tree_flatten((args, kwargs), is_leaf=_generators)
        leaves = [None if _generators(leaf) else _copy(leaf) for leaf in leaves]
        outputs = []
        if role(name) == "text":
            outputs = [_copy(tensor) for tensor in returned_tensors(output)]
        rows = next((len(t) for t in leaves if isinstance(t, Tensor) and t.dim()), 0)
        seen[name].append(_Seen(method, leaves, structure, outputs, rows))

    with ExitStack() as stack:
        for name in names:
            method = "decode" if role(name) == "vae" else "forward"
            see = partial(keep, name, method)
            stack.enter_context(_seeing(getattr(pipeline, name), method, see))
        yield seen


@contextmanager
def _seeing(module: nn.Module, method: str, see: Callable) -> Iterator[None]:
    """Call `see` with arguments and result of each call of a method."""
    original, own = getattr(module, method), vars(module).get(method)

    @wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        see(args, kwargs, output)
        return output

    setattr(module, method, call)
    try:
        yield
    finally:
        if own is None:
            delattr(module, method)
        else:
            setattr(module, method, own)


@contextmanager
def _quiet(pipeline: Any) -> Iterator[None]:
    """Generate without the pipeline's own progress bars."""
    before = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**before)


def _generators(value: Any) -> bool:
    """Whether it is a source of random numbers, which a recorded call has no use for."""
    values = value if isinstance(value, list) and value else [value]
    return all(isinstance(v, torch.Generator) for v in values)


def _copy(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
