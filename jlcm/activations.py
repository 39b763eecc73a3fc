"""Memory of a network's activations at inference: analytic on the meta device, and measured.

The peak is not the largest activation: a skip connection keeps its input alive while its branch
runs (Section 3.1 of the paper). So the network is executed once, on tensors without values, and
every storage that an operation makes gets a lifetime. Views share the storage of their base, and
operations in place make none.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from jlcm.packed import nbytes


@dataclass(frozen=True, kw_only=True)
class LiveTensor:
    """A storage that is in memory at the peak.

    Attributes:
        module: name of the module that made it; empty for the network itself and for its inputs.
        operation: that made it, for instance "aten.conv2d"; "input" for an input.
        shape: of the tensor that the operation returned.
        dtype: likewise.
        nbytes: of the storage.
    """

    module: str
    operation: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class ActivationFootprint:
    """Memory of one forward pass.

    Attributes:
        weight_bytes: parameters and buffers, each once; single numbers (a norm's count of batches)
            are not counted.
        peak_bytes: of the activations, inputs and outputs included, where each is freed after its
            last use.
        eager_peak_bytes: the same where each is freed when Python lets go of it, as PyTorch does;
            the caller keeps the inputs.
        operation: that runs at the peak (the first of `peak_bytes`), with its module.
        alive: at that point, in the order in which they were made.
    """

    weight_bytes: int
    peak_bytes: int
    eager_peak_bytes: int
    operation: str
    alive: tuple[LiveTensor, ...]


def activation_footprint(
    model: nn.Module,
    inputs: Any,
    *,
    dtype: torch.dtype | None = torch.float16,
    device: str | torch.device = "meta",
) -> ActivationFootprint:
    """Count the bytes of a network's weights, and of its activations at the peak of a forward.

    What an operation needs for itself while it runs (attention's products, a convolution's
    workspace) is not counted: `measured_activation_peak` has it.

    Args:
        model: any network; it is neither changed nor moved. Its weights may be on any device.
        inputs: a tensor, a tuple of arguments or a dictionary of keyword arguments. Only their
            shapes and dtypes matter on the meta device.
        dtype: of the floating weights and inputs; None for those they have.
        device: where the network is executed: "meta" costs neither memory nor arithmetic, any
            other one is for networks that look at the values of their tensors.

    Returns:
        The footprint.

    Raises:
        ValueError: the network cannot run on these inputs, or not without values.
    """
    device = torch.device(device)

    def converted(tensor: Tensor) -> Tensor:
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        if device.type == "meta":
            return torch.empty_like(tensor, dtype=kind, device=device)
        return tensor.to(device, kind)

    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = {name: converted(tensor.detach()) for name, tensor in state.items()}
    # Copies, because a slice would bring along the whole storage that it is taken from.
    args, kwargs = _arguments(tree_map_only(Tensor, lambda t: converted(t).clone(), inputs))
    trace = _Trace(model, list(state.values()), tree_leaves((args, kwargs)))
    try:
        with trace.running():
            outputs = functional_call(model, state, args, kwargs)
    except (NotImplementedError, RuntimeError) as error:
        if device.type != "meta":
            raise
        raise ValueError(
            f"{type(model).__name__} cannot run without values: {str(error).splitlines()[0]} "
            '(if it looks at values, pass device="cpu")'
        ) from error
    return trace.footprint(outputs)


def measured_activation_peak(model: nn.Module, inputs: Any) -> int:
    """Measure the largest memory beside the weights during one forward, workspaces included.

    On the CPU it is what PyTorch's allocator hands out, summed up from the profiler's events, on
    a GPU `torch.cuda.max_memory_allocated`. One forward runs before, so that what is allocated
    once and kept is not counted.

    Args:
        model: on its device, with its dtype.
        inputs: as for `activation_footprint`, on that device. They are counted.

    Returns:
        Bytes.
    """
    args, kwargs = _arguments(inputs)
    rise = _rise_on_gpu if any(t.is_cuda for t in _tensors(inputs)) else _rise_on_cpu
    with _inference(model):
        model(*args, **kwargs)
        return sum(t.nbytes for t in _tensors(inputs)) + rise(lambda: model(*args, **kwargs))


def _rise_on_gpu(forward: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    forward()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _rise_on_cpu(forward: Callable[[], Any]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        forward()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(accumulate((e.nbytes() for e in changes), initial=0))


def _arguments(inputs: Any) -> tuple[tuple, dict[str, Any]]:
    match inputs:
        case dict():
            return (), inputs
        case tuple() | list():
            return tuple(inputs), {}
    return (inputs,), {}


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the modes are restored."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


@dataclass(eq=False)
class _Storage:
    """A storage and its lifetime, in numbers of operations; ends are exclusive."""

    tensor: LiveTensor
    ref: StorageWeakRef
    born: int
    unused: int  # end of its last use
    freed: int | None = None  # None: never

    @property
    def size(self) -> int:
        return self.tensor.nbytes


class _Trace(TorchDispatchMode):
    """Follows the storages that operations make, while it is active."""

    def __init__(self, model: nn.Module, weights: list[Tensor], inputs: list[Any]) -> None:
        super().__init__()
        self._model = model
        self._names = {module: name for name, module in model.named_modules()}
        self._running: list[str] = []
        self._operations: list[str] = []
        self._weights = {_ref(weight) for weight in weights}
        self._bytes = sum(nbytes(w) for w in weights if w.is_floating_point() or w.dim())
        self._storages: dict[StorageWeakRef, _Storage] = {}
        self._alive: set[_Storage] = set()
        for tensor in _tensors(inputs):
            self._made(tensor, "input", born=0, unused=0)
        self._inputs = set(self._storages)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Record a forward of the network."""
        fused = torch.backends.mha.get_fastpath_enabled()  # one operation for a whole layer
        with ExitStack() as stack:
            torch.backends.mha.set_fastpath_enabled(False)
            stack.callback(torch.backends.mha.set_fastpath_enabled, fused)
            for handle in (
                register_module_forward_pre_hook(self._enter),
                register_module_forward_hook(self._leave, always_call=True),
            ):
                stack.callback(handle.remove)
            stack.enter_context(_inference(self._model))
            stack.enter_context(self)
            yield

    def footprint(self, outputs: Any) -> ActivationFootprint:
        """Sum up, while the outputs are held."""
        self._look_for_freed()
        steps = max(1, len(self._operations))
        kept = {_ref(tensor) for tensor in _tensors(outputs)}
        # Other objects may hold outputs too, for instance a cache of keys and values.
        kept |= {storage.ref for storage in self._alive} - self._inputs
        for storage in self._storages.values():
            if storage.ref in kept:
                storage.unused = steps
        everything = list(self._storages.values())
        peak, at = _peak([(s.size, s.born, s.unused) for s in everything], steps)
        held = [(s.size, s.born, steps if s.freed is None else s.freed) for s in everything]
        return ActivationFootprint(
            weight_bytes=self._bytes,
            peak_bytes=peak,
            eager_peak_bytes=_peak(held, steps)[0],
            operation=self._operations[at] if self._operations else "none",
            alive=tuple(s.tensor for s in everything if s.born <= at < s.unused),
        )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._look_for_freed()
        kwargs = kwargs or {}
        step, name = len(self._operations), str(func.overloadpacket)
        outputs = func(*args, **kwargs)
        for tensor in _tensors((args, kwargs)):
            storage = self._storages.get(_ref(tensor))
            if storage is None:  # held by the network, but no parameter or buffer
                self._weights.add(_ref(tensor))
            else:
                storage.unused = step + 1
        for tensor in _tensors(outputs):
            self._made(tensor, name, born=step, unused=step + 1)
        module = self._running[-1] if self._running else ""
        self._operations.append(f"{module} {name}".strip())
        return outputs

    def _made(self, tensor: Tensor, operation: str, *, born: int, unused: int) -> None:
        ref = _ref(tensor)
        if ref in self._weights or ref in self._storages:  # a view, or in place
            return
        made = LiveTensor(
            module=self._running[-1] if self._running else "",
            operation=operation,
            shape=tuple(tensor.shape),
            dtype=tensor.dtype,
            nbytes=tensor.untyped_storage().nbytes(),
        )
        storage = self._storages[ref] = _Storage(made, ref, born, unused)
        self._alive.add(storage)

    def _look_for_freed(self) -> None:
        gone = {storage for storage in self._alive if storage.ref.expired()}
        for storage in gone:
            storage.freed = len(self._operations)
        self._alive -= gone

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._running.append(self._names.get(module, ""))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()


def _ref(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _peak(spans: list[tuple[int, int, int]], steps: int) -> tuple[int, int]:
    """Largest sum of the sizes of (size, begin, end) at one of `steps` points, and where it is."""
    changes = [0] * (steps + 1)
    for size, begin, end in spans:
        changes[begin] += size
        changes[max(begin, end)] -= size
    sums = list(accumulate(changes[:steps]))
    peak = max(sums)
    return peak, sums.index(peak)
