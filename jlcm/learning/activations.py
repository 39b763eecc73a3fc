"""Activations of the calibration inputs, in memory up to a limit and on disk past it."""

import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from jlcm.files import replacing

#: Values of a network's graph by node, those that later nodes still read.
State = dict[Any, Any]


class Activations:
    """One entry for each batch of calibration inputs: the state of both networks.

    Attributes:
        memory: bytes that entries may take in memory together.
        folder: where a temporary folder is made for the rest, None for the system's place.
    """

    def __init__(self, memory: int, folder: Path | None = None) -> None:
        """Start empty.

        Args:
            memory: bytes of tensors kept in memory.
            folder: where a temporary folder is made for the rest, None for the system's place.
        """
        self.memory = memory
        self.folder, self._temporary = folder, None
        self._held: dict[int, tuple[State, State]] = {}
        self._files: dict[int, Path] = {}

    def put(self, number: int, states: tuple[State, State]) -> None:
        """Keep the states of a batch in place of its earlier ones.

        Raises:
            OSError: the disk is full.
        """
        fits = self.fits(number, states)
        states = tuple({k: _to_cpu(v) for k, v in state.items()} for state in states)
        if fits:
            self._held[number] = states
            if number in self._files:
                self._files.pop(number).unlink()
            return
        tensors: dict[str, Tensor] = {}
        for model, state in enumerate(states):
            for place, (node, value) in enumerate(state.items()):
                if isinstance(value, Tensor):
                    # Two values may be views of one storage, which a file cannot hold.
                    tensors[f"{model}:{place}"] = value.clone()
                    state[node] = None
        self._files[number] = path = self._place() / f"{number}.safetensors"
        with replacing(path) as temporary:  # earlier tensors of this entry may map the old file
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        self._held[number] = states

    def fits(self, number: int, states: tuple[State, State]) -> bool:
        """Whether the states of a batch, in place of its earlier ones, stay in memory."""
        others = sum(size_of(held) for other, held in self._held.items() if other != number)
        return others + size_of(states) <= self.memory

    def get(self, number: int) -> tuple[State, State]:
        """The states of a batch: copies of the dictionaries, tensors on the CPU."""
        states = tuple(dict(state) for state in self._held[number])
        if number in self._files:
            for name, tensor in load_file(self._files[number]).items():
                model, place = map(int, name.split(":"))
                states[model][list(states[model])[place]] = tensor
        return states

    def _place(self) -> Path:
        if self._temporary is None:
            if self.folder is not None:
                self.folder.mkdir(parents=True, exist_ok=True)
            self._temporary = tempfile.TemporaryDirectory(prefix="activations-", dir=self.folder)
        return Path(self._temporary.name)


class Tensors:
    """One tensor for each batch of calibration inputs, kept like `Activations`."""

    def __init__(self, memory: int, folder: Path | None = None) -> None:
        """Start empty; arguments as there."""
        self._kept = Activations(memory, folder)

    def __setitem__(self, number: int, tensor: Tensor) -> None:
        """Keep the tensor of a batch."""
        self._kept.put(number, ({"tensor": tensor}, {}))

    def __getitem__(self, number: int) -> Tensor:
        """The tensor of a batch, on the CPU."""
        return self._kept.get(number)[0]["tensor"]


def size_of(states: tuple[State, State]) -> int:
    """Bytes of the tensors; one that both networks share counts once."""
    tensors = {id(v): v for state in states for v in state.values() if isinstance(v, Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _to_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value
