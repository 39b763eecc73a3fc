"""Calibration of decoder networks, one decoder layer at a time.

A language model of transformers is an embedding, a list of alike decoder layers and a head. The
hidden states between two decoder layers are all that is kept of the calibration inputs, and only
the decoder layer that is learned is on the device in full precision.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from jlcm.decoder import before_layers, decoder_layers
from jlcm.hooks import replaced_forwards, stopping, watching
from jlcm.learning.activations import Activations, State, size_of
from jlcm.learning.calibration import Calibration, Layer
from jlcm.learning.forward import precision

#: Where a state has the output of the reference's decoder layer, if it has run.
_OUTPUT = "output"
#: Tokens that suffice to see which modules run, and what they share.
_FEW_TOKENS = 8


def calibrate(
    packed: nn.Module, reference: nn.Module, batches: Sequence[Tensor] | Tensor, **options: Any
) -> Calibration:
    """Run both networks on calibration inputs in the way that suits them.

    Args:
        packed: compressed network.
        reference: its full-precision twin.
        batches: calibration inputs; token ids (n, length) for a decoder network.
        options: of `Calibration`.

    Raises:
        ValueError: as `Calibration`.
    """
    kind = Calibration if decoder_layers(reference) is None else DecoderCalibration
    return kind(packed, reference, batches, **options)


class DecoderCalibration(Calibration):
    """`Calibration` of a decoder network: the reference stays where it is, but for what runs."""

    def _trace(self) -> None:
        self.nodes = None
        self._list = decoder_layers(self.reference)
        self._depth = len(self._modules[1][self._list])
        self._home = next(self.reference.parameters()).device
        self._others: dict[tuple[int, tuple], list[tuple[tuple, dict]]] = {}
        self._inputs: tuple[str, Activations] | None = None
        for number, batch in enumerate(self.inputs):
            self._kept.put(number, tuple({0: self._embed(m, batch)} for m in range(2)))
        self._at = -1
        self._enter(0)

    def _calls(self) -> list[tuple[str, int]]:
        calls: list[tuple[str, int]] = []
        self._layer(1).to(self._home)
        with watching(self.reference, lambda name, _: calls.append((name, 0))):
            self._call(1, self.inputs[0][:1, :_FEW_TOKENS])
        self._layer(1).to(self.device)
        return calls

    def _arguments(self, layer: Layer) -> Iterator[tuple[tuple[tuple, dict], ...]]:
        if isinstance(self._modules[1][layer.module], nn.Embedding):
            raise NotImplementedError("an embedding is no matrix product")
        inside = layer.module.startswith(f"{self._list}.")
        index = int(layer.module[len(self._list) + 1 :].split(".")[0]) if inside else self._depth
        while self._at < index:
            self._advance()
        first = self._leaders.get(layer.module, layer.module)
        if self._inputs is None or self._inputs[0] != first:
            found = Activations(self._kept.memory // 2, self._kept.folder)
            for number in range(len(self.inputs)):
                packed, reference = self._kept.get(number)
                value = reference.get(first)
                if value is None:
                    value = self._input(1, first, number, reference)
                found.put(number, ({0: self._input(0, first, number, packed)}, {0: value}))
            self._inputs = first, found
        module = self._modules[1][layer.module].to(self.device)
        dtype = module.weight.dtype  # autocast gives narrower ones
        try:
            for number in range(len(self.inputs)):
                states = self._inputs[1].get(number)
                yield tuple(((state[0].to(self.device, dtype),), {}) for state in states)
        finally:
            if not inside:
                module.to(self._home)

    def _layer(self, model: int) -> nn.Module:
        """The decoder layer that is learned."""
        return self._modules[model][f"{self._list}.{self._at}"]

    def _enter(self, index: int) -> None:
        """Go to a decoder layer, and see which of its modules are given the same tensor.

        Where memory suffices the reference runs through it just once: what its linear layers are
        given is kept.
        """
        self._at, self._inputs, self._leaders = index, None, {}
        if index == self._depth:
            return
        layer, prefix = self._layer(1).to(self.device), f"{self._list}.{index}"
        seen: list[tuple[str, Any]] = []
        wanted: State = {}
        with watching(layer, lambda name, args: seen.append((name, args and args[0]))):
            self._run_layer(1, 0, self._kept.get(0)[1][0][:1])
        for name, value in seen:
            first = next(other for other, held in seen if held is value)
            self._leaders.setdefault(f"{prefix}.{name}", f"{prefix}.{first}")
            if isinstance(layer.get_submodule(name), nn.Linear) and isinstance(value, Tensor):
                wanted[first] = value
        if size_of((wanted, {})) * self.count > self._kept.memory // 2:
            return

        def keep(name: str, args: tuple) -> None:
            if name in wanted:  # as it is now, because some networks go on to change it in place
                found.setdefault(f"{prefix}.{name}", args[0].clone())

        for number in range(len(self.inputs)):
            packed, reference = self._kept.get(number)
            found: State = {}
            with watching(layer, keep):
                found[_OUTPUT] = self._run_layer(1, number, reference[0])
            self._kept.put(number, (packed, reference | found))

    def _advance(self) -> None:
        """Run the finished decoder layer in both networks and go to the next."""
        for number in range(len(self.inputs)):
            packed, reference = self._kept.get(number)
            output = reference.get(_OUTPUT)
            if output is None:
                output = self._run_layer(1, number, reference[0])
            self._kept.put(number, ({0: self._run_layer(0, number, packed[0])}, {0: output}))
        self._layer(1).to(self._home)
        self._enter(self._at + 1)

    def _run_layer(self, model: int, number: int, hidden: Tensor) -> Tensor:
        args, kwargs = self._others[model, tuple(self.inputs[number].shape)][self._at]
        plain = hidden.dtype != torch.float32
        with precision("fp32" if plain else self.precision, self.device):
            output = self._layer(model)(hidden.to(self.device), *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def _input(self, model: int, name: str, number: int, state: State) -> Tensor:
        """What a module of the current decoder layer, or after the last, is given."""
        with stopping(self._modules[model][name]) as found:
            if self._at < self._depth:
                self._run_layer(model, number, state[0])
            else:
                hidden = state[0].to(self._device(model))
                layers = self._modules[model][self._list]
                with replaced_forwards(layers, lambda *_, **__: hidden):
                    self._call(model, self.inputs[number])
        if not found:
            raise NotImplementedError("it does not run on every calibration batch")
        args, kwargs = found[0]
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            raise NotImplementedError("it is not called with one tensor")
        return args[0]

    def _embed(self, model: int, batch: Tensor) -> Tensor:
        """Hidden states before the decoder layers; keeps what else these are given."""
        network = (self.packed, self.reference)[model]
        hidden, others = before_layers(network, batch.to(self._device(model)))
        # Masks and rotary embeddings depend on the shape alone, since no input is padded.
        if (model, tuple(batch.shape)) not in self._others:
            self._others[model, tuple(batch.shape)] = _to_device(others, self.device, {})
        return hidden

    def _call(self, model: int, batch: Tensor) -> Any:
        network = (self.packed, self.reference)[model]
        return network(batch.to(self._device(model)), use_cache=False)

    def _device(self, model: int) -> torch.device:
        return (self.device, self._home)[model]


def _to_device(value: Any, device: torch.device, moved: dict[int, tuple]) -> Any:
    """Move tensors in nested arguments; one that appears twice is moved once."""
    match value:
        case Tensor():
            return moved.setdefault(id(value), (value, value.to(device)))[1]
        case tuple() | list():
            return type(value)(_to_device(item, device, moved) for item in value)
        case dict():
            return {key: _to_device(item, device, moved) for key, item in value.items()}
    return value
