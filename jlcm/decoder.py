"""Language models of transformers: an embedding, a list of alike decoder layers and a head."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from jlcm.hooks import Stopped, replaced_forwards
from jlcm.permutation import Member, PermutationGroup
from jlcm.pipeline import PipelineNetwork
from jlcm.reorder import permutation_groups


def decoder_layers(model: nn.Module) -> str | None:
    """Name of the list of decoder layers in a language model of transformers.

    Returns:
        None for a network of another kind.
    """
    if not callable(getattr(model, "get_decoder", None)):
        return None
    lists = {
        name: sum(t.numel() for t in [*module.parameters(), *module.buffers()])
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    return max(lists, key=lists.get, default=None)


def before_layers(model: nn.Module, tokens: Tensor) -> tuple[Tensor, list[tuple[tuple, dict]]]:
    """Run a decoder network up to its first decoder layer.

    Args:
        model: a decoder network.
        tokens: ids (n, length) int64, on the model's device.

    Returns:
        Hidden states (n, length, size), and for each decoder layer what it is given beside them
            (masks, rotary embeddings), positional and by keyword.
    """
    layers = model.get_submodule(decoder_layers(model))
    hidden, others = [], []

    def skip(states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        hidden.append(states)
        others.append((args, kwargs))
        if len(others) == len(layers):
            raise Stopped
        return states

    with replaced_forwards(layers, skip), suppress(Stopped):
        model(tokens, use_cache=False)
    return hidden[0], others


@contextmanager
def recorded_layers(model: nn.Module) -> Iterator[list[Any]]:
    """Keep what the decoder layers of a forward are given, or the components of a pipeline return.

    Nothing of a network without them.
    """
    if isinstance(model, PipelineNetwork):
        with model.recorded() as states:
            yield states
        return
    states = []
    name = decoder_layers(model)
    layers = () if name is None else model.get_submodule(name)
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: states.append(args[0])) for layer in layers
    ]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def skipped_layers(model: nn.Module, states: list[Any], tensor: str) -> Iterator[None]:
    """Run forwards on the same input from the decoder layer, or the component, that has a tensor.

    Args:
        model: a network.
        states: of `recorded_layers`, of one forward; of a pipeline, of all that are run again.
        tensor: name of a parameter; one outside the decoder layers skips nothing.
    """
    if isinstance(model, PipelineNetwork):
        with model.repeating(states, tensor.partition(".")[0]):
            yield
        return
    name = decoder_layers(model)
    inside = name is not None and tensor.startswith(f"{name}.")
    index = int(tensor.removeprefix(f"{name}.").split(".")[0]) if inside else 0
    if not 0 < index < len(states):
        yield
        return
    with replaced_forwards(model.get_submodule(name)[:index], lambda *_, **__: states[index]):
        yield


def decoder_groups(model: nn.Module, tokens: Tensor) -> list[PermutationGroup]:
    """`permutation_groups` inside the decoder layers: hidden units of MLPs, values of heads.

    Decoder layers of equal structure are analysed once.

    Args:
        model: a decoder network.
        tokens: a few ids (1, length) int64, on the model's device.

    Raises:
        ReorderError: as `permutation_groups`.
    """
    name = decoder_layers(model)
    hidden, others = before_layers(model, tokens)
    known: dict[str, list[PermutationGroup]] = {}
    found = []
    for index, layer in enumerate(model.get_submodule(name)):
        shapes = {n: tuple(p.shape) for n, p in layer.named_parameters()}
        structure = f"{type(layer)} {shapes}"
        if structure not in known:
            args, kwargs = others[index]
            inputs = (hidden, *args)
            known[structure] = permutation_groups(_Called(layer, kwargs), inputs)
        found += [_below(f"{name}.{index}", group) for group in known[structure]]
    return found


class _Called(nn.Module):
    """A decoder layer with its keyword arguments filled in."""

    def __init__(self, layer: nn.Module, kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.layer, self.kwargs = layer, kwargs

    def forward(self, *args: Tensor) -> Tensor:
        return self.layer(*args, **self.kwargs)


def _below(name: str, group: PermutationGroup) -> PermutationGroup:
    """The group in the decoder layer of this name."""

    def moved(part: Member | PermutationGroup, field: str) -> Any:
        tensor = getattr(part, field).removeprefix("layer.")
        return replace(part, **{field: f"{name}.{tensor}"})

    members = tuple(moved(member, "name") for member in group.members)
    return replace(moved(group, "producer"), members=members)
