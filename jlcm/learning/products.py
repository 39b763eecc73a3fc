"""The matrix product inside a layer: its inputs as columns, whatever the layer's class.

A layer's call is intercepted at `linear` or `conv1d`/`conv2d`, so subclasses that pad or reshape
their input first need no cases of their own.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from jlcm.layers import is_plain_linear

_CONVOLUTIONS = {F.conv1d: 1, F.conv2d: 2, torch.conv1d: 1, torch.conv2d: 2}


class _Intercepted(Exception):
    """Carries the product out of a forward before it is computed."""


class _Interceptor(TorchFunctionMode):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = module

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.linear or function in _CONVOLUTIONS:
            weight, own = args[1] if len(args) > 1 else kwargs["weight"], self._module.weight
            if weight is not own and not torch.equal(weight, own):
                raise NotImplementedError("it does not multiply by its weight as it is stored")
            if function is F.linear:
                raise _Intercepted(Product(args[0] if args else kwargs["input"]))
            raise _Intercepted(_convolution(_CONVOLUTIONS[function], *args, **kwargs))
        return function(*args, **kwargs)


@dataclass(frozen=True)
class Product:
    """Input of a linear layer (..., n), or of a convolution, padded (inputs, channels, *size).

    Attributes:
        input: the tensor.
        groups: of the convolution.
        kernel: its size, empty for a linear layer.
        stride: per dimension.
        dilation: per dimension.
    """

    input: Tensor
    groups: int = 1
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()

    def sizes(self, inputs: int) -> tuple[int, ...]:
        """Output positions per input: (tokens,) or the output size of the convolution."""
        if not self.kernel:
            return (self.input.numel() // self.input.shape[-1] // inputs,)
        space = self.input.shape[2:]
        steps = zip(space, self.kernel, self.stride, self.dilation, strict=True)
        return tuple((size - d * (k - 1) - 1) // s + 1 for size, k, s, d in steps)

    def length(self) -> int:
        """Inputs of a neuron, n."""
        if not self.kernel:
            return self.input.shape[-1]
        return self.input.shape[1] // self.groups * math.prod(self.kernel)

    def sample(self, positions: int, inputs: int, generator: torch.Generator) -> Tensor:
        """(chosen,) int64 output positions, ascending, the same for all inputs."""
        total = math.prod(self.sizes(inputs))
        if total <= positions:
            return torch.arange(total)
        return torch.randperm(total, generator=generator)[:positions].sort().values

    def columns(self, chosen: Tensor, inputs: int) -> Tensor:
        """(inputs, groups, n, chosen): what is multiplied by the weight at the chosen positions."""
        chosen = chosen.to(self.input.device)
        if not self.kernel:
            rows = self.input.reshape(inputs, -1, self.input.shape[-1])
            return rows[:, chosen].mT.unsqueeze(1)
        sizes, space = self.sizes(inputs), self.input.shape[2:]
        index = torch.zeros(len(chosen), 1, dtype=torch.int64, device=chosen.device)
        left = chosen
        places = []
        for size in reversed(sizes):
            places.append(left % size)
            left = left // size
        for place, s, d, k, extent in zip(
            reversed(places), self.stride, self.dilation, self.kernel, space, strict=True
        ):
            taps = place[:, None] * s + torch.arange(k, device=chosen.device) * d
            index = (index[:, :, None] * extent + taps[:, None]).flatten(1)
        patches = self.input.flatten(2)[:, :, index]  # inputs, channels, chosen, taps
        patches = patches.transpose(2, 3).reshape(inputs, self.groups, -1, len(chosen))
        return patches

    def outputs(self, values: Tensor, chosen: Tensor, inputs: int) -> Tensor:
        """(inputs, groups, rows, chosen) of the layer's output."""
        chosen = chosen.to(values.device)
        if not self.kernel:
            return values.reshape(inputs, -1, values.shape[-1])[:, chosen].mT.unsqueeze(1)
        values = values.flatten(2)[:, :, chosen]
        return values.reshape(inputs, self.groups, -1, len(chosen))


def product_of(name: str, module: nn.Module, args: tuple, kwargs: dict) -> Product:
    """Find the product inside a layer's call without computing it.

    Args:
        name: of the weight: MultiheadAttention has two.
        module: the layer, or the attention that owns the weight.
        args: of the call.
        kwargs: of the call.

    Raises:
        NotImplementedError: there is no such product, another weight than the stored one is in it
            (weight standardisation), or attention is masked or crosses inputs.
    """
    if isinstance(module, nn.MultiheadAttention):
        query = _self_attention_input(module, args, kwargs)
        if name.endswith("in_proj_weight"):
            return Product(query)
        return Product(_heads(module, query))
    if is_plain_linear(module):
        return Product(args[0] if args else kwargs["input"])
    try:
        with _Interceptor(module):
            module.forward(*args, **kwargs)
    except _Intercepted as found:
        return found.args[0]
    raise NotImplementedError("it is no linear layer or convolution")


def multiplies_stored_weight(layer: nn.Linear | nn.Conv1d | nn.Conv2d) -> bool:
    """Whether a layer's product is with its weight as stored, not with one made from it.

    Weight standardisation, for instance, undoes every scale that a row is multiplied by.
    """
    if isinstance(layer, nn.Linear):
        shape = [layer.in_features]
    else:
        taps = zip(layer.kernel_size, layer.dilation, strict=True)
        shape = [layer.in_channels, *(d * (k - 1) + 1 for k, d in taps)]
    try:
        product_of("", layer, (layer.weight.new_zeros(1, *shape),), {})
    except (NotImplementedError, TypeError):  # TypeError: its forward takes more than the inputs
        return False
    return True


@contextmanager
def watching_products(
    model: nn.Module, names: Iterable[str], see: Callable[[str, Product], None]
) -> Iterator[None]:
    """Call `see` with each weight's name and product whenever its layer runs.

    Layers whose product is not found (`product_of`) are passed over.

    Args:
        model: owner of the weights.
        names: of the weights.
        see: what is called.
    """
    modules = dict(model.named_modules())

    def hook(name: str):
        def found(module: nn.Module, args: tuple, kwargs: dict) -> None:
            try:
                product = product_of(name, module, args, kwargs)
            except NotImplementedError:
                return
            see(name, product)

        return found

    hooks = []
    for name in names:
        owner = name.rpartition(".")[0]
        parent = modules[owner.rpartition(".")[0]]
        # The output projection of an attention is no call of its own.
        layer = parent if isinstance(parent, nn.MultiheadAttention) else modules[owner]
        hooks.append(layer.register_forward_pre_hook(hook(name), with_kwargs=True))
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


@contextmanager
def noting_calls(model: nn.Module, names: Iterable[str]) -> Iterator[list[str]]:
    """A list that gets the name of each of these modules whenever it begins to run."""
    calls: list[str] = []
    with ExitStack() as hooks:
        for name in names:
            hook = model.get_submodule(name).register_forward_pre_hook(
                lambda *_, name=name: calls.append(name)
            )
            hooks.callback(hook.remove)
        yield calls


def output_columns(name: str, module: nn.Module, args: tuple, kwargs: dict) -> Tensor:
    """Output of the reference's layer; of the projection that is asked for in an attention."""
    if not isinstance(module, nn.MultiheadAttention):
        return module(*args, **kwargs)
    query = _self_attention_input(module, args, kwargs)
    if name.endswith("in_proj_weight"):
        return F.linear(query, module.in_proj_weight, module.in_proj_bias)
    heads = _heads(module, query)
    return F.linear(heads, module.out_proj.weight, module.out_proj.bias)


def _self_attention_input(module: nn.MultiheadAttention, args: tuple, kwargs: dict) -> Tensor:
    """(inputs, tokens, n) of an unmasked self-attention."""
    names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask")
    given = dict(zip(names, args, strict=False)) | kwargs
    query = given["query"]
    plain = given["key"] is query and given["value"] is query
    masked = given.get("attn_mask") is not None or given.get("key_padding_mask") is not None
    if not plain or masked or module.bias_k is not None or query.dim() != 3:
        raise NotImplementedError("only unmasked self-attention can be learned layer by layer")
    return query if module.batch_first else query.transpose(0, 1)


def _heads(module: nn.MultiheadAttention, query: Tensor) -> Tensor:
    """(inputs, tokens, n) what the heads give to the output projection."""
    projected = F.linear(query, module.in_proj_weight, module.in_proj_bias)
    inputs, tokens, _ = query.shape
    q, k, v = projected.view(inputs, tokens, 3, module.num_heads, -1).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(inputs, tokens, -1)


def _convolution(
    dimensions, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1
) -> Product:
    def each(value) -> tuple[int, ...]:
        return (value,) * dimensions if isinstance(value, int) else tuple(value)

    kernel, stride, dilation = tuple(weight.shape[2:]), each(stride), each(dilation)
    if isinstance(padding, str):
        total = [
            d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)
        ]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        padding = each(padding)
        sides = [(p, p) for p in (padding * dimensions if len(padding) == 1 else padding)]
    if any(side for pair in sides for side in pair):
        input = F.pad(input, [side for pair in reversed(sides) for side in pair])
    return Product(input, groups, kernel, stride, dilation)
