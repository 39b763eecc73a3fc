"""How networks are cut into blocks."""

import pytest
import torch
from torch import nn

import jlcm
from jlcm.learning.calibration import Calibration
from jlcm.learning.partition import MOST_WEIGHTS, BlockOutputs, find_blocks


class Inverted(nn.Module):
    """Three convolutions without a skip, one of them inside a container."""

    def __init__(self, width: int) -> None:
        super().__init__()
        wide = 2 * width
        self.expand = nn.Sequential(nn.Conv2d(width, wide, 1), nn.BatchNorm2d(wide), nn.ReLU6())
        self.deep = nn.Conv2d(wide, wide, 3, padding=1, groups=wide)
        self.narrow = nn.Conv2d(wide, width, 1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x):
        return self.norm(self.narrow(self.deep(self.expand(x))))


class Attended(nn.Module):
    """Two linear layers with a skip, and arguments with defaults."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x, mask=None, causal=False):
        inner = self.up(x)
        mixed = nn.functional.scaled_dot_product_attention(
            inner, inner, inner, attn_mask=mask, is_causal=causal
        )
        return x + self.down(mixed)


class Encoder(nn.Module):
    """Hands the same optional arguments to all of its blocks."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attended(8) for _ in range(depth))
        self.head = nn.Linear(8, 3)

    def forward(self, x, mask=None, causal=False):
        for block in self.blocks:
            x = block(x, mask, causal)
        return self.head(x)


class Wrapped(nn.Module):
    """A network inside a network."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def calibration_of(model: nn.Module, x: torch.Tensor, memory=2**30, folder=None) -> Calibration:
    packed = jlcm.quantize(model.eval(), "rtn", bits=3, progress=False)
    return Calibration(
        packed,
        model,
        x,
        forward_batch=4,
        memory=memory,
        positions=1,
        held_out=0.1,
        seed=0,
        device=torch.device("cpu"),
        folder=folder,
    )


def names(model: nn.Module, x: torch.Tensor, least: int = 2) -> list[list[str]]:
    calibration = calibration_of(model, x)
    # The same names whether or not the network is wrapped.
    return [
        [name.removesuffix(".weight").removeprefix("inner.") for name in block.weights]
        for block in find_blocks(calibration, least)
    ]


def images() -> torch.Tensor:
    return torch.randn(12, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def tokens() -> torch.Tensor:
    return torch.randn(12, 5, 8, generator=torch.Generator().manual_seed(0))


def inverted() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 4, 1), Inverted(4), Inverted(4), nn.Conv2d(4, 2, 1), nn.Flatten()
    )


@pytest.mark.parametrize("wrap", [lambda m: m, Wrapped], ids=["bare", "wrapped"])
def test_inverted_residuals_without_a_skip_stay_whole(wrap):
    assert names(wrap(inverted()), images()) == [
        ["0", "1.expand.0", "1.deep", "1.narrow"],
        ["2.expand.0", "2.deep", "2.narrow"],
        ["3"],
    ]


def test_one_weight_suffices_where_asked_for():
    assert [len(block) for block in names(inverted(), images(), least=1)] == [1] * 8


def test_arguments_that_keep_their_defaults_do_not_join_blocks():
    assert names(Encoder(), tokens()) == [
        ["blocks.0.up", "blocks.0.down"],
        ["blocks.1.up", "blocks.1.down"],
        ["head"],
    ]


def linear(depth: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(depth)))


def test_containers_do_not_bind():
    assert [len(block) for block in names(nn.Sequential(linear(6)), tokens())] == [2, 2, 2]


def test_large_modules_do_not_bind():
    few, many = (Wrapped(Wrapped(linear(depth))) for depth in (MOST_WEIGHTS, MOST_WEIGHTS + 1))
    assert [len(block) for block in names(few, tokens())] == [MOST_WEIGHTS]
    assert [len(block) for block in names(many, tokens())] == [2] * (MOST_WEIGHTS // 2) + [1]


@pytest.mark.parametrize("memory", [0, 2**30])
def test_outputs_are_the_originals_in_memory_and_on_disk(memory, tmp_path):
    model, x = inverted(), images()
    calibration = calibration_of(model, x, memory, tmp_path)
    for block in find_blocks(calibration, 2):
        outputs = BlockOutputs(calibration, block)
        assert bool(list(tmp_path.rglob("*.safetensors"))) == (memory == 0)
    reached = torch.cat([outputs[number] for number in range(3)])
    with torch.no_grad():
        expected = model(x)
    assert torch.allclose(reached, expected, atol=1e-5)
    assert outputs.variance == pytest.approx(float(expected.var(correction=0)), rel=1e-4)
