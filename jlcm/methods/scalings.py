"""Where factors of input channels can go: into the operation before, without changing the function.

If an operation's output channels are divided by factors and the columns of all layers that read
them are multiplied by the same, the network computes what it did before. Places for such factors
are the norms before the projections of a decoder layer, up_proj before down_proj and v_proj before
o_proj in networks built like Llama, and what torch.fx finds elsewhere.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from jlcm.fold import trace
from jlcm.methods.chains import Chains


@dataclass(frozen=True)
class Scaling:
    """An operation that can take factors of its output channels, and all layers that read these.

    Attributes:
        producer: name of a module whose weight and bias have a row for each channel: a norm, a
            linear layer or a convolution.
        consumers: names of the weights whose columns are the channels.
        block: name of the module that holds the consumers, None where each stands alone.
    """

    producer: str
    consumers: tuple[str, ...]
    block: str | None = None


def find_scalings(
    model: nn.Module, norms: dict[str, tuple[Tensor, Tensor]], inputs: Tensor
) -> list[Scaling]:
    """Scalings that leave the network's function as it is, which is tried out.

    Args:
        model: in evaluation mode.
        norms: mean and standard deviation of outputs whose batch norms are folded, by layer.
        inputs: a few inputs, on the model's device.

    Returns:
        Those found, none of which shares a consumer with another.
    """
    found = _decoder_layers(model) or _traced(model, norms)
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    usable, taken = [], set()
    for scaling in found:
        rows = _rows(model, scaling)
        columns = [model.get_parameter(name) for name in scaling.consumers]
        alone = all(owners[id(tensor)] == 1 for tensor in (*rows, *columns))
        alone = alone and {weight.shape[1] for weight in columns} == {len(rows[0])}
        if alone and taken.isdisjoint(scaling.consumers) and _folds(model, scaling):
            usable.append(scaling)
            taken.update(scaling.consumers)
    if not _is_neutral(model, usable, inputs):
        usable = [scaling for scaling in usable if _is_neutral(model, [scaling], inputs)]
    return usable


@torch.no_grad()
def fold(model: nn.Module, scaling: Scaling, factors: Tensor) -> None:
    """Multiply the consumers' columns by factors and divide the producer's rows by them, in place.

    Args:
        model: owner of both.
        scaling: between them.
        factors: (channels,) float32, positive.
    """
    for tensor in _rows(model, scaling):
        tensor.copy_(tensor.float() / _along(factors, tensor, 0))
    for name in scaling.consumers:
        weight = model.get_parameter(name)
        weight.copy_(weight.float() * _along(factors, weight, 1))


def _rows(model: nn.Module, scaling: Scaling) -> list[Tensor]:
    module = model.get_submodule(scaling.producer)
    bias = getattr(module, "bias", None)
    return [module.weight] if bias is None else [module.weight, bias]


def _along(factors: Tensor, tensor: Tensor, dimension: int) -> Tensor:
    """Factors shaped to multiply a tensor along one dimension."""
    shape = [1] * tensor.dim()
    shape[dimension] = len(factors)
    return factors.to(tensor.device).view(shape)


def _decoder_layers(model: nn.Module) -> list[Scaling]:
    """Candidates by the names that the modules have in networks built like Llama."""
    found = []
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        attention, feed = (getattr(module, part, None) for part in ("self_attn", "mlp"))
        if _linears(attention, "q_proj", "k_proj", "v_proj") and _is_norm(
            module, "input_layernorm"
        ):
            inner = f"{prefix}self_attn"
            consumers = tuple(f"{inner}.{part}_proj.weight" for part in "qkv")
            found.append(Scaling(f"{prefix}input_layernorm", consumers, inner))
            # With fewer heads of values than of queries several columns would share a row.
            if _linears(attention, "o_proj") and _meet(attention.v_proj, attention.o_proj):
                found.append(Scaling(f"{inner}.v_proj", (f"{inner}.o_proj.weight",)))
        if _linears(feed, "gate_proj", "up_proj"):
            inner, consumers = f"{prefix}mlp", ("gate_proj", "up_proj")
            for norm in ("pre_feedforward_layernorm", "post_attention_layernorm"):
                if _is_norm(module, norm):
                    weights = tuple(f"{inner}.{part}.weight" for part in consumers)
                    found.append(Scaling(f"{prefix}{norm}", weights, inner))
                    break
            if _linears(feed, "down_proj") and _meet(feed.up_proj, feed.down_proj):
                found.append(Scaling(f"{inner}.up_proj", (f"{inner}.down_proj.weight",)))
    return found


def _linears(module: nn.Module | None, *names: str) -> bool:
    return module is not None and all(
        isinstance(getattr(module, name, None), nn.Linear) for name in names
    )


def _is_norm(module: nn.Module, name: str) -> bool:
    weight = getattr(getattr(module, name, None), "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 1


def _meet(first: nn.Linear, second: nn.Linear) -> bool:
    return first.out_features == second.in_features


def _traced(model: nn.Module, norms: dict[str, tuple[Tensor, Tensor]]) -> list[Scaling]:
    """Candidates in a network that torch.fx can trace: norms before layers, and pairs of layers."""
    try:
        graph, pairs = trace(model), Chains(model, norms).pairs()
    except ValueError:
        return []
    modules, found = dict(model.named_modules()), []
    for node in graph.nodes:
        module = modules.get(node.target) if node.op == "call_module" else None
        if isinstance(module, nn.LayerNorm | nn.RMSNorm) and module.weight is not None:
            consumers = [_consumer(user, modules, len(module.weight)) for user in node.users]
            if consumers and None not in consumers:
                found.append(Scaling(node.target, tuple(consumers)))
    for pair in pairs:
        # One channel to one: a factor of the column is one of the row, and changes no rounding.
        depthwise = getattr(modules[pair.second], "groups", 1) > 1
        if not pair.clipped and not depthwise:
            found.append(Scaling(pair.first, (f"{pair.second}.weight",)))
    return found


def _consumer(node: fx.Node, modules: dict[str, nn.Module], channels: int) -> str | None:
    """Weight of a layer that is called once, on one tensor of so many channels."""
    module = modules.get(node.target) if node.op == "call_module" else None
    if isinstance(module, nn.Linear) and module.in_features == channels:
        return f"{node.target}.weight"
    attention = isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None
    return f"{node.target}.in_proj_weight" if attention else None


@torch.no_grad()
def _folds(model: nn.Module, scaling: Scaling) -> bool:
    """Whether a producer's output is proportional to its weight and bias: some norms add 1."""
    module = model.get_submodule(scaling.producer)
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
        return True
    rows = _rows(model, scaling)
    kept = [tensor.clone() for tensor in rows]
    x = torch.arange(1, len(rows[0]) + 1, dtype=rows[0].dtype, device=rows[0].device)
    before = module(x[None])
    for tensor in rows:
        tensor.mul_(0.5)
    after = module(x[None])
    for tensor, values in zip(rows, kept, strict=True):
        tensor.copy_(values)
    return torch.equal(after, 0.5 * before)


@torch.no_grad()
def _is_neutral(model: nn.Module, scalings: list[Scaling], inputs: Tensor) -> bool:
    """Whether outputs stay when channels are scaled behind each producer and back at its readers.

    Factors are powers of two, so every product is exact. Whatever else reads a channel shows.
    """
    expected = _first_tensor(model(inputs))
    generator = torch.Generator().manual_seed(0)
    with ExitStack() as stack:
        for scaling in scalings:
            channels = len(_rows(model, scaling)[0])
            factors = 2.0 ** torch.randint(-1, 2, (channels,), generator=generator)
            stack.enter_context(_scaled(model, scaling, factors))
        found = _first_tensor(model(inputs))
    scale = expected.float().abs().max().clamp(min=1e-30)
    return bool(((found.float() - expected.float()).abs().max() / scale) < 1e-5)


@contextmanager
def _scaled(model: nn.Module, scaling: Scaling, factors: Tensor) -> Iterator[None]:
    """Scale between a producer and its consumers while this is active."""

    def shaped(module: nn.Module, values: Tensor) -> Tensor:
        convolution = isinstance(module, nn.Conv1d | nn.Conv2d)
        return factors.to(values).view([-1] + [1] * (len(module.kernel_size) if convolution else 0))

    def after(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output / shaped(module, output)

    def before(module: nn.Module, args: tuple) -> tuple:
        back = {id(x): x * shaped(module, x) for x in args if isinstance(x, Tensor)}
        return tuple(back.get(id(x), x) for x in args)  # one that comes twice stays one

    with ExitStack() as stack:
        producer = model.get_submodule(scaling.producer)
        stack.callback(producer.register_forward_hook(after).remove)
        for name in scaling.consumers:
            consumer = model.get_submodule(name.rpartition(".")[0])
            stack.callback(consumer.register_forward_pre_hook(before).remove)
        yield


def _first_tensor(output: Any) -> Tensor:
    """Logits, or else the first tensor, of what a network returned."""
    output = getattr(output, "logits", output)
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if isinstance(output, dict) else output))
    return output
