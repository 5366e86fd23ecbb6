"""Two small classifiers of 8x8 grey images: a convolutional network and a vision transformer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _conv(inner: int, out: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inner, out, 3, stride, 1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out), nn.ReLU())


class ResidualBlock(nn.Module):
    """``relu(x + f(x))``, ``f`` two 3x3 convolutions; [N, C, H, W] in and out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _conv(channels, channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.second(self.first(x))))


class Cnn(nn.Module):
    """Images [N, 1, 8, 8] to logits [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(1, 32)
        self.down1 = _conv(32, 64, 2)
        self.block1 = ResidualBlock(64)
        self.down2 = _conv(64, 128, 2)
        self.block2 = ResidualBlock(128)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block1(self.down1(self.stem(x)))
        x = self.block2(self.down2(x))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """Multi-head self-attention over tokens [N, T, D]."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._split(self.query(x)), self._split(self.key(x)), self._split(self.value(x))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block; [N, T, D] in and out."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Vit(nn.Module):
    """Images [N, 1, 8, 8], as sixteen 2x2 patches and a class token, to logits [N, 10]."""

    def __init__(self, dim: int = 128, depth: int = 4, heads: int = 4, hidden: int = 256) -> None:
        super().__init__()
        self.patch = nn.Linear(4, dim)
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(torch.randn(1, 17, dim) * 0.5)
        self.blocks = nn.ModuleList(Block(dim, heads, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), self.patch(patches)], 1) + self.position
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens[:, 0]))


def cnn() -> Cnn:
    """3x3 convolutions of 32, 64 and 128 channels, two residual blocks, batch norm, global pooling."""
    return Cnn()


def vit() -> Vit:
    """Four pre-norm blocks of width 128, four heads, MLP of 256."""
    return Vit()


MODELS = {"cnn": cnn, "vit": vit}
