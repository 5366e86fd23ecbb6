"""Small networks the tests share; every layer kind the passes know is in one of them."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvNet(nn.Module):
    """Dense, k x k, "same"-padded, strided, depthwise and 1x1 convolutions with batch norm, and two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(16)
        self.wide = nn.Conv2d(16, 32, 3, padding="same", bias=False)
        self.norm2 = nn.BatchNorm2d(32)
        self.down = nn.Conv2d(32, 32, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.pointwise = nn.Conv2d(32, 64, 1)
        self.norm3 = nn.BatchNorm2d(64)
        self.dropout = nn.Dropout(0.3)
        self.hidden = nn.Linear(64, 48)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.stem(x)))
        x = F.relu(self.norm2(self.wide(x)))
        x = F.relu(self.down(x))
        x = F.relu(self.norm3(self.pointwise(self.depthwise(x))))
        return self.head(F.relu(self.hidden(self.dropout(x.mean((2, 3))))))


class AttentionNet(nn.Module):
    """One pre-norm transformer block over tokens [N, T, 32], mean-pooled to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.norm2 = nn.LayerNorm(32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)
        self.head = nn.Linear(32, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


class Mlp(nn.Module):
    """64 -> 96 -> 48 -> 10."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 96)
        self.second = nn.Linear(96, 48)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(x)))))


def conv_net() -> tuple[ConvNet, tuple[Tensor]]:
    """A seeded network whose batch-norm statistics are not the initial ones, and one batch for it."""
    torch.manual_seed(0)
    model = ConvNet()
    with torch.no_grad():
        for _ in range(4):
            model(torch.randn(16, 1, 8, 8) * 2 + 0.5)
    return model.eval(), (torch.randn(5, 1, 8, 8),)


def attention_net() -> tuple[AttentionNet, tuple[Tensor]]:
    torch.manual_seed(0)
    return AttentionNet().eval(), (torch.randn(5, 7, 32),)


def mlp() -> tuple[Mlp, tuple[Tensor]]:
    torch.manual_seed(0)
    return Mlp().eval(), (torch.randn(5, 64),)


NETS = {"conv": conv_net, "attention": attention_net, "mlp": mlp}


def parameter_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of a store."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def packed(machine: Any, library: Any, store: Mapping[str, Tensor]) -> list[Any]:
    """The run-time tensors of a built library, from the raw ones by name."""
    import tvm

    tensors: list[Any] = []
    for function, names in library.packs.items():
        tensors += machine[function](*(tvm.runtime.tensor(store[n].detach().contiguous().numpy()) for n in names))
    return tensors
