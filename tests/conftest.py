"""Small networks shared by the tests. Nobody may change the session's networks in place."""

import copy
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import jlcm

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start beside each other
torch.set_num_threads(1)  # the networks are tiny, threads would only wait for each other


class Mixer(nn.Module):
    """Inverted residual: pointwise, depthwise and pointwise convolutions with a skip."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(width, hidden, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
        self.norm2 = nn.BatchNorm2d(hidden)
        self.project = nn.Conv2d(hidden, width, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.expand(x)).relu()
        y = self.norm2(self.depthwise(y)).relu()
        return x + self.norm3(self.project(y))


class Cnn(nn.Module):
    """Skips, a depthwise convolution, a biased convolution and batch norms; (N, 3, 8, 8) inputs."""

    def __init__(self, width: int = 16, hidden: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(Mixer(width, hidden), Mixer(width, hidden))
        self.wide = nn.Conv2d(width, 2 * width, 3, stride=2, bias=False)
        self.wide_norm = nn.BatchNorm2d(2 * width)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.norm(self.stem(x)).relu())
        return self.head(self.wide_norm(self.wide(x)).relu().mean((2, 3)))


class Vit(nn.Module):
    """A vision transformer of nn.MultiheadAttention blocks; (N, 3, 16, 16) inputs."""

    def __init__(self, width: int = 32, heads: int = 4, depth: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 17, width) * 0.02)
        layers = [
            nn.TransformerEncoderLayer(
                width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(depth)
        ]
        self.layers = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.layers(x))[:, 0])


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics and scales as training leaves them: nothing is 0 or 1."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                if module.track_running_stats:
                    uniform(module.running_mean, -0.3, 0.3)
                    uniform(module.running_var, 0.5, 2.0)
                if module.affine:
                    uniform(module.weight, 0.5, 1.5)
                    uniform(module.bias, -0.3, 0.3)
    return model.eval()


def build(network: type[nn.Module], **arguments) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomise(network(**arguments))


@pytest.fixture(scope="session")
def cnn() -> nn.Module:
    return build(Cnn)


@pytest.fixture(scope="session")
def vit() -> nn.Module:
    return build(Vit)


@pytest.fixture(scope="session")
def mlp() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 10)
        ).eval()


@pytest.fixture(scope="session")
def images() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def networks(cnn, vit, mlp, images) -> dict[str, tuple[nn.Module, Tensor]]:
    """Copies of the networks, each with an input."""
    pairs = {
        "cnn": (cnn, images[:, :, :8, :8]),
        "vit": (vit, images),
        "mlp": (mlp, images[:, 0, :8, :3].reshape(4, 24)),
    }
    return {name: (copy.deepcopy(model), inputs) for name, (model, inputs) in pairs.items()}


def compress(model: nn.Module, **options) -> nn.Module:
    return jlcm.compress(model, **{"alpha": 4.5, "init": "kmeans", "progress": False, **options})


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8)).eval()


@pytest.fixture(scope="module")
def packed() -> nn.Module:
    torch.manual_seed(0)
    return jlcm.compress(small(), alpha=3.5, encoding="auto", progress=False)


@pytest.fixture
def path(packed, tmp_path) -> Path:
    return jlcm.save(packed, tmp_path / "small.safetensors")
