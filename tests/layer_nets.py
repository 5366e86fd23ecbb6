"""Networks of every kind of layer the passes must cope with, one kind of trouble each."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Case = tuple[nn.Module, tuple[Tensor, ...]]


class Linears(nn.Module):
    """One linear in each way of writing it; weights lie as [in, out] or [out, in]."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.ParameterList([nn.Parameter(torch.randn(32, 32) / 6) for _ in range(7)])
        self.b = nn.Parameter(torch.randn(32))
        self.row = nn.Parameter(torch.randn(1, 32))
        self.left = nn.Parameter(torch.randn(24, 6))

    def forward(self, x: Tensor) -> Tensor:
        w, (batch, tokens, width) = self.w, x.shape
        y = F.relu(torch.addmm(self.b, x.reshape(-1, width), w[0])).view(batch, tokens, width)
        y = F.relu(y @ w[1] + self.b) @ w[2].T
        y = F.relu(torch.einsum("nti,io->nto", y, w[3])) + torch.einsum("n...i,oi->n...o", y, w[4])
        y = F.relu(F.linear(y, w[5].transpose(0, 1)))
        y = torch.addmm(self.row, y.reshape(-1, width), w[6].transpose(0, 1)).view(batch, tokens, width)
        return self.left @ y


class Convs(nn.Module):
    """1-d convolutions with batch norm, groups and strides, even kernels padded "same", 1x1x1."""

    def __init__(self) -> None:
        super().__init__()
        self.even = nn.Conv1d(8, 32, 4, padding="same")
        self.grouped = nn.Conv1d(32, 32, 3, stride=2, padding=1, groups=4, bias=False)
        self.norm = nn.BatchNorm1d(32)
        self.pointwise = nn.Conv1d(32, 32, 1)
        self.wide = nn.Conv2d(8, 16, (4, 3), padding="same", dilation=(1, 2))
        self.volume = nn.Conv3d(16, 24, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pointwise(F.relu(self.norm(self.grouped(F.relu(self.even(x))))))
        z = self.wide(x.unflatten(2, (4, 5)))
        return torch.cat([y.flatten(1), self.volume(F.relu(z)[:, :, None]).flatten(1)], 1)


class Whole(nn.Module):
    """What stays whole, in float: 3-d and transposed convolutions (one grouped), around linears."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(24, 32)
        self.up1 = nn.ConvTranspose1d(8, 8, 4, stride=2, padding=1)
        self.up2 = nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1, output_padding=1, groups=4)
        self.volume = nn.Conv3d(8, 8, 3, padding=1)
        self.up3 = nn.ConvTranspose3d(8, 4, 3, stride=(1, 2, 2), padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up1(self.head(x).unflatten(1, (8, 4)))
        y = self.up2(F.relu(y).unflatten(2, (2, 4)))
        return self.up3(F.relu(self.volume(y[:, :, None]))).flatten(1)


class Attention(nn.Module):
    """Packed self-attention, cross-attention with one and with two sources, and keys and values of other widths."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.MultiheadAttention(32, 4, batch_first=True)
        self.cross = nn.MultiheadAttention(32, 4, batch_first=True)
        self.apart = nn.MultiheadAttention(32, 4, bias=False)
        self.other = nn.MultiheadAttention(32, 4, kdim=16, vdim=24, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.own(x, x, x, need_weights=False)[0]
        memory = torch.tanh(x[:, ::2])
        x = x + self.cross(x, memory, memory, need_weights=False)[0]
        rows = x.transpose(0, 1)
        x = x + self.apart(rows, rows.tanh(), rows.relu())[0].transpose(0, 1)
        return x + self.other(x, memory[..., :16], memory[..., 8:])[0]


class Tied(nn.Module):
    """A table tied to the output layer, a linear called three times, and one weight under two names and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 32, padding_idx=0)
        self.places = nn.Embedding(7, 32)
        self.again = nn.Linear(32, 32)
        self.one, self.two = nn.Linear(32, 32), nn.Linear(32, 32)
        self.two.weight = self.one.weight
        self.head = nn.Linear(32, 50)
        self.head.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words) + self.places(torch.arange(words.shape[1], device=words.device))
        x = self.again(x) + self.again(4 * F.relu(self.again(x)))
        return self.head(self.two(torch.tanh(self.one(x))))


class Recurrent(nn.Module):
    """LSTM (both directions) and GRU, kept whole, between linears."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(24, 32)
        self.lstm = nn.LSTM(32, 8, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(self.lstm(self.stem(x))[0])[0])


class GroupedHeads(nn.Module):
    """A block as language models have it: four heads of queries, two of keys and values; gate and up."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, n, bias=False) for n in (64, 32, 32))
        self.out = nn.Linear(64, 64, bias=False)
        self.gate, self.up = nn.Linear(64, 96, bias=False), nn.Linear(64, 96, bias=False)
        self.down = nn.Linear(96, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(2, (-1, 16)).transpose(1, 2) for p in (self.q, self.k, self.v))
        heads = F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def _made(make: Callable[[], nn.Module], *inputs: Tensor) -> Case:
    return make().eval(), inputs


def layer_net(name: str) -> Case:
    """A seeded network and one batch for it."""
    torch.manual_seed(0)
    if name == "linears":
        return _made(Linears, torch.randn(3, 6, 32))
    if name == "convs":
        model = Convs()
        with torch.no_grad():
            for _ in range(3):
                model(torch.randn(16, 8, 20) + 0.5)
        # The first of such batches has a value on a rounding tie.
        return model.eval(), (torch.randn(2, 3, 8, 20)[1],)
    if name == "whole":
        return _made(Whole, torch.randn(3, 24))
    if name == "attention":
        return _made(Attention, torch.randn(3, 6, 32))
    if name == "tied":
        return _made(Tied, torch.randint(0, 50, (3, 7)))
    if name == "recurrent":
        return _made(Recurrent, torch.randn(3, 3, 24))
    return _made(GroupedHeads, torch.randn(3, 6, 64))


LAYER_NETS = ("linears", "convs", "whole", "attention", "tied", "recurrent", "grouped")
