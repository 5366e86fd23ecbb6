"""Random modules of mixed pieces, drawn by hypothesis so that a failing one shrinks to the smallest that fails."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

Shape = tuple[int, ...]
Draw = Callable[..., object]
Piece = tuple[nn.Module, Shape]


@dataclass(frozen=True)
class Case:
    """A module, a batch for it, and the same sample shape at another batch size."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    others: tuple[Tensor, ...]

    def __repr__(self) -> str:
        return f"{tuple(self.inputs[0].shape)} -> {self.model}"


class Lambda(nn.Module):
    """A function of one tensor as a module, shown by its name."""

    def __init__(self, name: str, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.name, self.function = name, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def extra_repr(self) -> str:
        return self.name


class Residual(nn.Module):
    def __init__(self, inner: nn.Module, scale: float) -> None:
        super().__init__()
        self.inner, self.scale = inner, scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.inner(x)


class Branches(nn.Module):
    """Two branches joined by concatenation along dimension ``dim`` or, gated, by a product with a sigmoid."""

    def __init__(self, left: nn.Module, right: nn.Module, dim: int | None) -> None:
        super().__init__()
        self.left, self.right, self.dim = left, right, dim

    def forward(self, x: Tensor) -> Tensor:
        if self.dim is None:
            return self.left(x) * torch.sigmoid(self.right(x))
        return torch.cat([self.left(x), self.right(x)], self.dim)


class Twice(nn.Module):
    """One module, called two times: shared weights."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(F.relu(self.inner(x)))


class Product(nn.Module):
    """A linear layer as people write it without ``nn.Linear``."""

    def __init__(self, width_in: int, width_out: int, how: str) -> None:
        super().__init__()
        shape = (width_out, width_in) if how in ("linear", "addmm", "einsum") else (width_in, width_out)
        self.how = how
        self.weight = nn.Parameter(torch.randn(shape) / math.sqrt(width_in))
        self.bias = nn.Parameter(torch.randn(width_out))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "linear":
            return F.linear(x, self.weight, self.bias)
        if self.how == "addmm":
            flat = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight.t())
            return flat.reshape(*x.shape[:-1], -1)
        if self.how == "einsum":
            return torch.einsum("...i,oi->...o", x, self.weight) + self.bias
        return x @ self.weight + self.bias

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, {self.how}"


class Attention(nn.Module):
    """Self-attention written out: separate or packed projections, fused or explicit product, causal or not."""

    def __init__(self, width: int, heads: int, packed: bool, fused: bool, causal: bool) -> None:
        super().__init__()
        self.heads, self.packed, self.fused, self.causal = heads, packed, fused, causal
        self.project = nn.ModuleList([nn.Linear(width, 3 * width)] if packed else [nn.Linear(width, width)] * 0)
        if not packed:
            self.project.extend(nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        parts = self.project[0](x).chunk(3, -1) if self.packed else [layer(x) for layer in self.project]
        q, k, v = (p.reshape(n, t, self.heads, d // self.heads).transpose(1, 2) for p in parts)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            scores = q @ k.transpose(-1, -2) / math.sqrt(d // self.heads)
            if self.causal:
                scores = scores.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), float("-inf"))
            y = scores.softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(n, t, d))


_ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "elu": F.elu,
    "clamp": lambda x: x.clamp(-1, 1),
    "abs": torch.abs,
    "softplus": F.softplus,
    "dropout": None,
}


@st.composite
def _activation(draw: Draw, shape: Shape) -> Piece:
    name = draw(st.sampled_from(sorted(_ACTIVATIONS)))
    if name == "dropout":
        return nn.Dropout(0.2), shape
    return Lambda(name, _ACTIVATIONS[name]), shape  # type: ignore[index, arg-type]


def _width(draw: Draw) -> int:
    return draw(st.sampled_from([5, 8, 12, 16, 24, 33, 48]))  # type: ignore[return-value]


def _trained_norm(norm: nn.Module) -> nn.Module:
    """Statistics and affine terms that are not the initial ones."""
    with torch.no_grad():
        for name, tensor in [*norm.named_parameters(), *norm.named_buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5 if "bias" not in name else torch.randn_like(tensor))
    return norm


@st.composite
def _conv(draw: Draw, shape: Shape) -> Piece:
    c, h, w = shape
    out = _width(draw)
    kernel = draw(st.sampled_from([1, 1, 2, 3, 3, 5]))
    dilation = draw(st.sampled_from([1, 1, 1, 2])) if kernel > 1 else 1
    stride = draw(st.sampled_from([1, 1, 1, 2]))
    groups = draw(st.sampled_from([1, 1, 1, c, math.gcd(c, out)]))
    out = c if groups == c else out
    bias = draw(st.booleans())
    same = stride == 1 and draw(st.booleans())
    padding: object = "same" if same else draw(st.sampled_from([kernel // 2, kernel - 1, (kernel // 2, 0)]))
    conv = nn.Conv2d(c, out, kernel, stride, padding, dilation, groups, bias)  # type: ignore[arg-type]
    pad = (0, 0) if same else (padding, padding) if isinstance(padding, int) else padding
    sizes = [
        size if same else (size + 2 * p - dilation * (kernel - 1) - 1) // stride + 1
        for size, p in zip((h, w), pad, strict=True)  # type: ignore[arg-type]
    ]
    if min(sizes) < 1:
        return nn.Conv2d(c, out, 1, groups=groups, bias=bias), (out, h, w)
    return conv, (out, *sizes)


@st.composite
def _image_piece(draw: Draw, shape: Shape, depth: int) -> Piece:
    c, h, w = shape
    kinds = ["conv", "conv", "norm", "activation", "pool", "linear", "transposed"]
    kind = draw(st.sampled_from([*kinds, *(["residual", "concat", "gate"] if depth else [])]))
    if kind == "conv":
        return draw(_conv(shape))  # type: ignore[return-value]
    if kind == "norm":
        norm = draw(st.sampled_from([nn.BatchNorm2d(c), nn.GroupNorm(math.gcd(c, 4), c), nn.InstanceNorm2d(c)]))
        return (_trained_norm(norm) if h * w > 1 or isinstance(norm, nn.BatchNorm2d) else nn.Identity()), shape
    if kind == "activation":
        return draw(_activation(shape))  # type: ignore[return-value]
    if kind == "pool" and min(h, w) >= 2:
        pool = draw(st.sampled_from([nn.MaxPool2d(2), nn.AvgPool2d(2), nn.MaxPool2d(3, 1, 1)]))
        smaller = (h, w) if isinstance(pool, nn.MaxPool2d) and pool.stride == 1 else (h // 2, w // 2)
        return pool, (c, *smaller)
    if kind == "linear":
        out = _width(draw)
        channels_last = Lambda("channels last", lambda x: x.permute(0, 2, 3, 1))
        channels_first = Lambda("channels first", lambda x: x.permute(0, 3, 1, 2))
        return nn.Sequential(channels_last, nn.Linear(c, out), channels_first), (out, h, w)
    if kind == "transposed" and max(h, w) <= 6:
        out = _width(draw)
        return nn.ConvTranspose2d(c, out, 2, 2), (out, 2 * h, 2 * w)
    if kind == "gate":
        squeeze = Lambda("mean", lambda x: x.mean((2, 3), keepdim=True))
        gate = nn.Sequential(squeeze, nn.Conv2d(c, 8, 1), nn.ReLU(), nn.Conv2d(8, c, 1))
        return Branches(nn.Identity(), gate, None), shape
    if kind in ("residual", "concat"):
        return _joined(draw, shape, kind, lambda s: draw(_image_piece(s, depth - 1)), 1)  # type: ignore[arg-type, return-value]
    return nn.Identity(), shape


def _joined(draw: Draw, shape: Shape, kind: str, piece: Callable[[Shape], Piece], dim: int) -> Piece:
    inner, after = piece(shape)
    if kind == "residual":
        if after == shape:
            return Residual(inner, draw(st.sampled_from([1.0, 0.5]))), shape  # type: ignore[arg-type]
        return inner, after
    other, beside = piece(shape)
    axis = dim - 1
    if after[:axis] + after[axis + 1 :] == beside[:axis] + beside[axis + 1 :]:
        joined = (*after[:axis], after[axis] + beside[axis], *after[axis + 1 :])
        return Branches(inner, other, dim), joined
    return inner, after


@st.composite
def _linear(draw: Draw, shape: Shape) -> Piece:
    out = _width(draw)
    how = draw(st.sampled_from(["module", "module", "linear", "addmm", "matmul", "einsum", "parametrized"]))
    after = (*shape[:-1], out)
    if how == "module":
        return nn.Linear(shape[-1], out, bias=draw(st.booleans())), after  # type: ignore[arg-type]
    if how == "parametrized":
        return nn.utils.parametrizations.weight_norm(nn.Linear(shape[-1], out)), after
    return Product(shape[-1], out, how), after  # type: ignore[arg-type]


@st.composite
def _sequence_piece(draw: Draw, shape: Shape, depth: int) -> Piece:
    t, d = shape
    kinds = ["linear", "linear", "norm", "activation", "attention", "mha", "conv1d", "mix", "slice", "shared", "halves"]
    kind = draw(st.sampled_from([*kinds, *(["residual", "concat"] if depth else [])]))
    if kind == "linear":
        return draw(_linear(shape))  # type: ignore[return-value]
    if kind == "norm":
        return _trained_norm(draw(st.sampled_from([nn.LayerNorm(d), nn.RMSNorm(d)]))), shape  # type: ignore[arg-type]
    if kind == "activation":
        return draw(_activation(shape))  # type: ignore[return-value]
    heads = draw(st.sampled_from([1, 2, 4]))
    if kind == "attention" and d % heads == 0:
        flags = [draw(st.booleans()) for _ in range(3)]
        return Attention(d, heads, *flags), shape  # type: ignore[arg-type]
    if kind == "mha" and d % heads == 0:
        layer = nn.TransformerEncoderLayer(d, heads, 2 * d, 0.1, batch_first=True, norm_first=draw(st.booleans()))  # type: ignore[arg-type]
        return layer, shape
    if kind == "conv1d":
        out, kernel = _width(draw), draw(st.sampled_from([1, 3]))
        first = Lambda("channels first", lambda x: x.transpose(1, 2))
        return nn.Sequential(first, nn.Conv1d(d, out, kernel, padding=kernel // 2), first), (t, out)  # type: ignore[operator, arg-type]
    if kind == "mix":
        swap = Lambda("swap", lambda x: x.transpose(1, 2))
        return nn.Sequential(swap, nn.Linear(t, t), swap), shape
    if kind == "slice" and t > 2:
        return Lambda("x[:, 1:]", lambda x: x[:, 1:]), (t - 1, d)
    if kind == "shared":
        return Twice(nn.Linear(d, d)), shape
    if kind == "halves" and d % 2 == 0:
        return Lambda("a * silu(b)", lambda x: x.chunk(2, -1)[0] * F.silu(x.chunk(2, -1)[1])), (t, d // 2)
    if kind in ("residual", "concat"):
        return _joined(draw, shape, kind, lambda s: draw(_sequence_piece(s, depth - 1)), 2)  # type: ignore[arg-type, return-value]
    return nn.Identity(), shape


@st.composite
def _vector_piece(draw: Draw, shape: Shape, depth: int) -> Piece:
    (d,) = shape
    kinds = ["linear", "linear", "norm", "activation", "shared"]
    kind = draw(st.sampled_from([*kinds, *(["residual", "concat"] if depth else [])]))
    if kind == "linear":
        return draw(_linear(shape))  # type: ignore[return-value]
    if kind == "norm":
        return _trained_norm(draw(st.sampled_from([nn.LayerNorm(d), nn.BatchNorm1d(d)]))), shape  # type: ignore[arg-type]
    if kind == "activation":
        return draw(_activation(shape))  # type: ignore[return-value]
    if kind == "shared":
        return Twice(nn.Linear(d, d)), shape
    return _joined(draw, shape, kind, lambda s: draw(_vector_piece(s, depth - 1)), 1)  # type: ignore[arg-type, return-value]


_PIECES = {3: _image_piece, 2: _sequence_piece, 1: _vector_piece}


@st.composite
def _bridge(draw: Draw, shape: Shape) -> Piece:
    """From one kind of shape to another: image to tokens or vector, tokens to vector or image."""
    if len(shape) == 3:
        c, h, w = shape
        if draw(st.booleans()):
            return Lambda("tokens", lambda x: x.flatten(2).transpose(1, 2)), (h * w, c)
        if draw(st.booleans()) or c * h * w > 600:
            return Lambda("mean", lambda x: x.mean((2, 3))), (c,)
        return nn.Flatten(), (c * h * w,)
    if len(shape) == 2:
        t, d = shape
        side = math.isqrt(t)
        if side * side == t and side > 1 and draw(st.booleans()):
            return Lambda("image", lambda x: x.transpose(1, 2).reshape(x.shape[0], d, side, side)), (d, side, side)
        return Lambda("mean", lambda x: x.mean(1)), (d,)
    return nn.Identity(), shape


@st.composite
def _stack(draw: Draw, shape: Shape, most: int) -> Piece:
    pieces: list[nn.Module] = []
    for _ in range(draw(st.integers(1, most))):  # type: ignore[call-overload]
        piece, shape = draw(_PIECES[len(shape)](shape, 2))  # type: ignore[operator, misc]
        pieces.append(piece)
    return nn.Sequential(*pieces), shape


@st.composite
def cases(draw: Draw) -> Case:
    """A random module and inputs for it; its weights depend on one drawn seed."""
    torch.manual_seed(draw(st.integers(0, 2**16)))  # type: ignore[arg-type]
    start = draw(st.sampled_from(["image", "tokens", "sequence", "vector"]))
    pieces: list[nn.Module] = []
    if start == "image":
        shape: Shape = (draw(st.sampled_from([1, 3, 8])), *(draw(st.integers(4, 9)) for _ in range(2)))  # type: ignore[assignment]
    elif start == "vector":
        shape = (_width(draw),)
    else:
        shape = (draw(st.integers(2, 9)), _width(draw))  # type: ignore[assignment]
    first = shape
    if start == "tokens":
        pieces.append(nn.Embedding(31, shape[1]))
    for most in (4, 3):
        stack, shape = draw(_stack(shape, most))  # type: ignore[misc]
        bridge, shape = draw(_bridge(shape))  # type: ignore[misc]
        pieces += [stack, bridge]
    pieces.append(nn.Linear(shape[-1], 10))
    rows = draw(st.integers(2, 4))

    def batch(n: int) -> tuple[Tensor, ...]:
        if start == "tokens":
            return (torch.randint(0, 31, (n, first[0])),)
        return (torch.randn(n, *first),)

    return Case(nn.Sequential(*pieces).eval(), batch(rows), batch(rows + 3))  # type: ignore[operator, arg-type]
