"""Kept activations: the same values from memory and from disk, a limit, and no files left over."""

import gc

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import jlcm
from jlcm.learning import calibration as module
from jlcm.learning.activations import Activations, size_of
from jlcm.learning.calibration import Calibration

pytestmark = pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")


class Deep(nn.Module):
    """Enough nodes between layers that activations are written again, and skips across them."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.last = (nn.Conv2d(c, 8, 3, padding=1) for c in (3, 8, 8))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(module.RERUN))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = skip = self.stem(x)
        low, high = x.chunk(2, 1)
        for norm in self.norms:
            x = norm(x)
        y = self.inner(x) + skip
        for norm in self.norms:
            y = F.gelu(y) + norm(y)
        y = self.last(y.view(y.shape[0], 8, -1).view_as(y))
        return self.head((y + skip).mean((2, 3)) + torch.cat([high, low], 1).mean((2, 3)))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def states(seed=0):
    """Values of every kind; the networks share one, and two are views of one storage."""
    x = draw(6, 4, seed=seed)
    compressed = {
        "input": x,
        "row": x[2],
        "transposed": x.T,
        "every other": x[::2],
        "half": x.half(),
        "bfloat16": x.bfloat16(),
        "double": x.double(),
        "integers": (x * 100).long(),
        "mask": x > 0,
        "scalar": torch.tensor(float(seed)),
        "empty": torch.empty(0, 4),
        "special": torch.tensor([torch.inf, -torch.inf, -0.0, 1e-42]),
        "nothing": None,
        "shape": x.shape,
        "number": 7,
        "text": "valid",
    }
    return compressed, {"input": x, "transposed": x.T + 1, "nothing": None, 3: x + 1}


def equal(a, b):
    """Bit by bit, types and order included."""
    if len(a) != 2 or any(list(s) != list(t) for s, t in zip(a, b, strict=True)):
        return False
    for s, t in zip(a, b, strict=True):
        for value, other in zip(s.values(), t.values(), strict=True):
            if not isinstance(value, torch.Tensor):
                if value != other or type(value) is not type(other):
                    return False
            elif value.dtype != other.dtype or not torch.equal(value, other):
                return False
            elif value.is_floating_point() and not torch.equal(value.signbit(), other.signbit()):
                return False
    return True


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


SIZE = size_of(states())


@pytest.mark.parametrize("room", [0, 1, 2.5, 4])
def test_round_trip_is_exact_in_memory_and_on_disk(room, tmp_path):
    kept = Activations(int(room * SIZE), tmp_path)
    for number in range(4):
        kept.put(number, states(number))
    assert files(tmp_path) == [f"{n}.safetensors" for n in range(int(room), 4)]
    for number in (2, 0, 3, 1, 2):
        assert equal(kept.get(number), states(number))


def test_size_counts_shared_tensors_once():
    x, y = torch.zeros(6, 4), torch.zeros(3, dtype=torch.float16)
    assert size_of(({"a": x, "b": x, "n": 3}, {"a": x, "c": y, "d": None})) == 96 + 6
    assert size_of(({}, {})) == 0


@pytest.mark.parametrize("memory", [0, 10**6])
def test_dictionaries_are_copies(memory, tmp_path):
    kept, given = Activations(memory, tmp_path), states()
    kept.put(0, given)
    assert equal(given, states())  # left alone
    given[0].clear()
    first = kept.get(0)
    first[0].clear()
    first[1]["more"] = 1
    assert equal(kept.get(0), states())


@pytest.mark.parametrize("memory", [0, 10**6])
def test_an_entry_takes_the_place_of_the_earlier_one(memory, tmp_path):
    kept = Activations(memory, tmp_path)
    kept.put(0, states(0))
    kept.put(1, states(1))
    got = kept.get(0)
    kept.put(0, states(5))
    assert equal(kept.get(0), states(5)) and equal(kept.get(1), states(1))
    assert equal(got, states(0))  # what was read before stays as it is
    kept.put(0, got)
    kept.put(1, kept.get(1))
    assert equal(kept.get(0), states(0)) and equal(kept.get(1), states(1))


def test_memory_that_becomes_free_is_used_and_files_go(tmp_path):
    kept = Activations(SIZE, tmp_path)
    small = {"input": torch.ones(2)}, {}
    kept.put(0, states(0))
    kept.put(1, states(1))
    assert files(tmp_path) == ["1.safetensors"]
    kept.put(0, small)  # leaves too little for the other
    kept.put(1, states(1))
    assert files(tmp_path) == ["1.safetensors"]
    kept.put(1, small)
    assert files(tmp_path) == []
    assert equal(kept.get(1), small)
    kept.put(1, states(2))
    assert files(tmp_path) == ["1.safetensors"]
    assert equal(kept.get(1), states(2)) and equal(kept.get(0), small)


def test_memory_limit_is_respected(tmp_path):
    kept = Activations(10_000, tmp_path)
    sizes = torch.randint(1, 1500, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    held = {}
    for step, size in enumerate(sizes):
        number = step % 7
        held[number] = {"x": draw(size, seed=step), "k": step}, {"x": draw(size, seed=step + 1)}
        kept.put(number, held[number])
        on_disk = {int(name.partition(".")[0]) for name in files(tmp_path)}
        in_memory = sum(size_of(held[n]) for n in held if n not in on_disk)
        assert in_memory <= 10_000
        # Only what did not fit when it came is on disk.
        assert number not in on_disk or in_memory + size_of(held[number]) > 10_000
    assert on_disk and len(on_disk) < 7
    assert all(equal(kept.get(number), value) for number, value in held.items())


def test_nothing_is_written_as_long_as_all_fits(tmp_path):
    kept = Activations(3 * SIZE, tmp_path / "new")
    for number in range(3):
        kept.put(number, states(number))
    assert not (tmp_path / "new").exists()


def test_temporary_folder_goes_with_the_object(tmp_path):
    (tmp_path / "0000.safetensors").write_bytes(b"of a finished layer")
    kept, other = Activations(0, tmp_path), Activations(0, tmp_path)
    kept.put(0, states(0))
    other.put(0, states(1))  # two at once do not meet
    assert equal(kept.get(0), states(0))
    assert len(list(tmp_path.iterdir())) == 3
    got = kept.get(0)
    del kept, other
    gc.collect()
    assert [path.name for path in tmp_path.iterdir()] == ["0000.safetensors"]
    assert equal(got, states(0))


def calibrated(model, packed, x, memory, folder=None, **options):
    return Calibration(
        packed, model, x, memory=memory, folder=folder, device=torch.device("cpu"),
        **{"forward_batch": 8, "positions": 7, "held_out": 0.25, "seed": 0} | options,
    )  # fmt: skip


def pairs(calibration, index):
    return [found for *found, weights in calibration.pairs(index) if weights is None]


@torch.no_grad()
def columns(calibration):
    return [pairs(calibration, index) for index in range(len(calibration.layers))]


def same(a, b):
    return all(
        torch.equal(s, t)
        for layers in zip(a, b, strict=True)
        for batches in zip(*layers, strict=True)
        for s, t in zip(*batches, strict=True)
    )


def deep():
    torch.manual_seed(0)
    model = Deep().eval().requires_grad_(False)
    packed = jlcm.compress(model, alpha=3.5, init="kmeans", reorder="none", progress=False)
    return model, packed, draw(30, 3, 9, 9)


@torch.no_grad()
def test_columns_are_the_same_from_memory_and_from_disk(tmp_path):
    model, packed, x = deep()
    expected = columns(calibrated(model, packed, x, 2**30, tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    assert [len(batches) for batches in expected] == [4] * 4
    for memory, on_disk in ((0, 4), (20_000, 4), (100_000, 3), (300_000, 2)):
        calibration, found = calibrated(model, packed, x, memory, tmp_path), []
        for index in range(4):
            found.append(pairs(calibration, index))
            if calibration.layers[index].name == "last.weight":
                assert len(files(tmp_path)) == on_disk
        assert same(found, expected)
        del calibration
    assert files(tmp_path) == []


def test_columns_are_those_of_the_networks_run_from_the_start():
    model, packed, x = deep()
    inputs, outputs = [], []
    packed.last.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    model.last.register_forward_hook(lambda _, given, output: outputs.append(output))
    calibration = calibrated(model, packed, x, 0, positions=10**6)
    found = list(columns(calibration)[2])
    assert calibration.layers[2].name == "last.weight"
    inputs.clear()
    outputs.clear()
    for batch in x.split(8):
        with torch.no_grad():
            model(batch), packed(batch)
    for (a, b, _), value, output in zip(found, inputs, outputs, strict=True):
        unfolded = F.unfold(value, 3, padding=1)
        torch.testing.assert_close(a[:, 0], unfolded, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(b[:, 0], output.flatten(2), rtol=1e-5, atol=1e-5)


def test_number_of_sampled_positions(monkeypatch):
    model, packed, x = deep()

    def sampled(positions):
        found = columns(calibrated(model, packed, x, 2**30, positions=positions))
        return [batches[0][0].shape[-1] for batches in found]

    assert sampled(1) == [81, 81, 81, 1]  # all, of few
    monkeypatch.setattr(module, "LEAST_POSITIONS", 30 * 20)
    assert sampled(1) == [20, 20, 20, 1]
    # 40 for each of 27 or 72 inputs of a neuron, over 30 calibration inputs
    assert sampled(40) == [36, 81, 81, 1]
    assert sampled(29) == [27, 70, 70, 1]


def test_held_out_inputs_do_not_depend_on_the_batches():
    model, packed, x = deep()
    for size in (30, 8, 7, 1):
        calibration = calibrated(model, packed, x, 0, forward_batch=size)
        held = torch.cat([calibration.held(n) for n in range(len(calibration.inputs))])
        assert held.nonzero().flatten().tolist() == list(range(3, 30, 4))
