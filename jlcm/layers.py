"""Layers that stay packed in memory and decode when they run.

`store` turns a module into one whose tensors are read through properties: the module keeps its
class's `forward`, but its `weight` is decoded when it is asked for and dropped when the forward
ends. That serves every layer type alike (Linear, convolutions, MultiheadAttention, timm's and
transformers' subclasses), and never more than one layer's weights exist at a time. A plain
linear layer with rotated rows alone has its own forward: it rotates the inputs where those are few.
"""

import sys
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from jlcm.packed import PackedWeight, StoredWeight, apply_to_bytes
from jlcm.rotation import rotate

#: Name of the submodule that holds a module's stored tensors.
STORE = "packed"
#: Called with each network as soon as its layers are packed; `jlcm.huggingface` adds one.
WHEN_PACKED: list[Callable[[nn.Module], None]] = []


class HalfTensor(nn.Module):
    """A tensor held in 16 bits (biases, norms); calling it casts to the computing dtype.

    Attributes:
        values: the stored tensor, float16 or bfloat16.
        dtype: floating dtype on use.
    """

    def __init__(self, values: Tensor, dtype: torch.dtype = torch.float32) -> None:
        """Hold `values`."""
        super().__init__()
        self.dtype = dtype
        self.register_buffer("values", values)

    def forward(self) -> Tensor:
        """The tensor in the computing dtype."""
        return self.values.to(self.dtype)

    def _apply(self, fn, recurse=True):
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.values.device)).dtype
        return apply_to_bytes(self, fn)


class Constant(nn.Module):
    """A vector of equal values, made on use: it costs no memory.

    Attributes:
        value: of every entry.
        count: number of entries.
        dtype: floating dtype of the vector.
    """

    def __init__(self, value: float, count: int, dtype: torch.dtype = torch.float32) -> None:
        """Describe the vector."""
        super().__init__()
        self.value, self.count, self.dtype = value, count, dtype
        self.register_buffer("anchor", torch.empty(0, dtype=torch.uint8), persistent=False)

    def forward(self) -> Tensor:
        """The vector, on the device that the module was moved to."""
        return torch.full((self.count,), self.value, dtype=self.dtype, device=self.anchor.device)

    def _apply(self, fn, recurse=True):
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.anchor.device)).dtype
        return apply_to_bytes(self, fn)


Stored = StoredWeight | HalfTensor | Constant


def to_half(values: Tensor, name: str) -> Tensor:
    """Round to float16; 16-bit, integer and complex tensors are kept as they are.

    Raises:
        ValueError: if a value does not fit float16.
    """
    if values.dtype in (torch.float16, torch.bfloat16) or not values.is_floating_point():
        return values.detach().clone()
    half = values.detach().to(torch.float16)
    if not half.isfinite().all():
        raise ValueError(
            f"tensor {name!r} has values beyond 65504, the range of float16: rescale the network"
        )
    return half


def store(module: nn.Module, stored: dict[str, Stored]) -> None:
    """Replace tensors of a module by stored forms, in place.

    Args:
        module: owner of the tensors. Its class becomes a subclass, "Packed<class>", with a
            property for each name.
        stored: stored form by the name of the parameter or buffer.

    Raises:
        ValueError: if the module already has an attribute named "packed" of its own.
    """
    if hasattr(module, STORE):
        raise ValueError(f"{type(module).__name__} already has an attribute {STORE!r}")
    replaced = (*stored, "_flat_weights") if isinstance(module, nn.RNNBase) else tuple(stored)
    for name in replaced:
        module._parameters.pop(name, None)
        module._buffers.pop(name, None)
        module.__dict__.pop(name, None)
    module.add_module(STORE, nn.ModuleDict(stored))
    module.__class__ = _packed_class(type(module), tuple(sorted(stored)))


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, Stored]]:
    """Every stored tensor of a compressed model with the full name it replaces.

    A tensor that several modules share comes once for each of them; a module that the model holds
    under several names has the first.
    """
    for module_name, module in model.named_modules():
        store_ = module._modules.get(STORE)
        if isinstance(store_, nn.ModuleDict) and hasattr(type(module), "_packed_names"):
            for name, stored in store_.items():
                yield (f"{module_name}.{name}" if module_name else name), stored


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module, packed or not, computes what `nn.Linear` does."""
    return "forward" not in vars(module) and _unpacked(type(module)).forward is nn.Linear.forward


def _unpacked(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that `store` made a class from."""
    return next(k for k in kind.__mro__ if not k.__module__.startswith("jlcm."))


def computing_dtype(model: nn.Module) -> torch.dtype:
    """Floating dtype that a network computes in, packed or not: that of its first weight."""
    stored = (held.dtype for _, held in stored_tensors(model))
    dtypes = [*stored] or [tensor.dtype for tensor in model.parameters()]
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


def packed_subclass(
    mixin: type, kind: type[nn.Module], kept: tuple[str, ...] = ()
) -> type[nn.Module]:
    """Subclass of another library's class for packed models, which goes by that class's name.

    Args:
        mixin: with the methods that differ.
        kind: the class, or one that `store` made of it.
        kept: class methods that make models anew, which are not packed.
    """
    origin = _unpacked(kind)
    body = {"__module__": origin.__module__, "__qualname__": origin.__qualname__}
    body |= {name: getattr(origin, name) for name in kept}
    return type(origin.__name__, (mixin, kind), body)


@cache
def _packed_class(cls: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    def forward(self, *args, **kwargs):
        # Some forwards ask for a weight several times (MultiheadAttention does): decode once.
        self.__dict__["_decoded"] = {}
        try:
            return cls.forward(self, *args, **kwargs)
        finally:
            self.__dict__["_decoded"] = None

    def reader(name: str) -> property:
        def read(self) -> Tensor:
            decoded = self.__dict__.get("_decoded")
            if decoded is None:
                return self._modules[STORE][name]()
            if name not in decoded:
                decoded[name] = self._modules[STORE][name]()
            return decoded[name]

        return property(read)

    def rotating_forward(self, inputs: Tensor) -> Tensor:
        held = self._modules[STORE]["weight"]
        # Whichever has fewer values is rotated, the inputs or the weight.
        if not isinstance(held, PackedWeight) or not held.rotated or inputs.numel() >= held.count:
            return forward(self, inputs)
        weight, inputs = held.encoded_rows().to(held.dtype), rotate(inputs.float()).to(inputs)
        return nn.functional.linear(inputs, weight, self.bias)

    linear = cls.forward is nn.Linear.forward and "weight" in names
    body = {name: reader(name) for name in names}
    body |= {
        "forward": rotating_forward if linear else forward,
        "_packed_names": names,
        "__module__": __name__,
    }
    if issubclass(cls, nn.Sequential | nn.ModuleList):  # the store is not one of its items
        body["__len__"] = lambda self: len(self._modules) - 1
        body["__iter__"] = lambda self: (m for n, m in self._modules.items() if n != STORE)
    if issubclass(cls, nn.RNNBase):  # its forward reads this list, which would keep the originals
        body["_flat_weights"] = property(
            lambda self: [getattr(self, name, None) for name in self._flat_weights_names],
            lambda self, value: None,
        )
    return type(f"Packed{cls.__name__}", (cls,), body)


def store_norm(
    norm: _BatchNorm,
    affine: tuple[Tensor, Tensor] | None,
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Store a batch norm as the two vectors it applies at inference, in place.

    Its forward still runs (subclasses add an activation there), with running mean 0 and a running
    variance that `eps` completes to 1.

    Args:
        norm: the batch norm, in evaluation mode.
        affine: float16 scale and shift, (channels,) each; None where the norm was folded into the
            layer before it and applies nothing any more.
        dtype: of the computation.
    """
    count = norm.num_features
    stored: dict[str, Stored] = {
        "weight": Constant(1.0, count, dtype),
        "bias": Constant(0.0, count, dtype),
        "running_mean": Constant(0.0, count, dtype),
        "running_var": Constant(1.0 - norm.eps, count, dtype),
    }
    if affine is not None:
        stored["weight"], stored["bias"] = (HalfTensor(vector, dtype) for vector in affine)
    norm.num_batches_tracked = None
    store(norm, stored)


def affine_of(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Scale and shift, (channels,) float32 each, that a batch norm applies at inference."""
    weight = torch.ones_like(norm.running_mean) if norm.weight is None else norm.weight
    bias = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias
    scale = weight.float() * (norm.running_var.float() + norm.eps).rsqrt()
    return scale.detach(), (bias.float() - norm.running_mean.float() * scale).detach()


def is_static_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm with running statistics, an affine map at inference."""
    return isinstance(module, _BatchNorm) and module.running_mean is not None


def unclip(model: nn.Module, names: list[str]) -> None:
    """Replace clipped activations by plain ReLU, in place.

    Args:
        model: owner of the activations.
        names: of ReLU6 modules; those that are ReLU already stay so.

    Raises:
        AttributeError: if the model has no such module.
        ValueError: if a module is another one.
    """
    for name in names:
        module = model.get_submodule(name)
        if not isinstance(module, nn.ReLU6 | nn.ReLU):
            raise ValueError(f"{name} is no ReLU6 but {type(module).__name__}")
        model.set_submodule(name, nn.ReLU(inplace=module.inplace))


def linearise(model: nn.Module, names: list[str] | None = None) -> list[str]:
    """Replace transformers' `Conv1D` (GPT-2's layer, a transposed weight) by `nn.Linear`, in place.

    Rows of a weight are output neurons everywhere else.

    Args:
        model: owner of the layers; the function that it computes stays the same.
        names: of the layers, those that are Linear already stay so; None for all.

    Returns:
        Names of the layers that were replaced.

    Raises:
        AttributeError: if the model has no such module.
        ValueError: if a module is another one.
    """
    kind = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", ())
    modules = dict(model.named_modules(remove_duplicate=False))
    if names is None:
        names = [name for name, module in modules.items() if isinstance(module, kind)]
    replaced: dict[int, nn.Linear] = {}
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, nn.Linear):
            continue
        if not isinstance(module, kind):
            raise ValueError(f"{name} is no Conv1D but {type(module).__name__}")
        if id(module) not in replaced:
            linear = nn.Linear(module.nx, module.nf, device="meta")
            linear.weight = nn.Parameter(module.weight.detach().T.contiguous())
            linear.bias = module.bias
            replaced[id(module)] = linear.train(module.training)
        model.set_submodule(name, replaced[id(module)])
    return names
