"""The common part of every elastic layer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from t3c_compile.passes.elastic.quantizer import ActivationQuantizer, Gate
from t3c_compile.passes.ops import fake_quantize_weight
from t3c_compile.passes.ops.nested import quantize_weight, weight_scale
from t3c_compile.passes.option import Option

Activation = tuple[float, int]
"""Scale and zero point of one int8 tensor."""


def of_call(tensor: str, call: int) -> str:
    """The name of an int8 tensor of one call of a layer: ``x`` of the first, ``x.1`` of the second."""
    return f"{tensor}.{call}" if call else tensor


class ElasticLayer(nn.Module):
    """A linear or convolution kept as factors up to ``max_rank``, run at the gate's rank and bits.

    Until the quantizer and hook passes have run, ``gate``, ``x_quant`` and the middle quantizers are None and the layer
    is a plain chain of factors. Factor scales are one number per component (or output channel) and never depend on the
    rank in use, which is what makes every profile a prefix of one stored copy.
    """

    form: ClassVar[str]
    op: ClassVar[Any]
    """The ``t3c::`` op this layer becomes when specialized."""
    float_op: ClassVar[Any] = None
    """The ATen op it becomes at 32 bits; dense layers have one."""
    weight_only_op: ClassVar[Any] = None
    """The ``t3c::`` op it becomes with float32 activations; linear layers have one."""
    middles: ClassVar[tuple[str, ...]] = ()
    """Names of the int8 tensors between factors: ``h``, then ``g``."""
    unrounded = False
    """Set while the model is known to be at 32 bits, where rounding a weight would only copy it."""
    ungated = False
    """Set while every component is known to be open, where closing none would only copy them."""
    float_activations = False
    """Whether activations stay float32, in training as in deployment; see ``ElasticGraphModule``."""

    def __init__(self, max_rank: int, bias: Tensor | None) -> None:
        super().__init__()
        self.max_rank = max_rank
        # Positions (tokens, pixels) of one sample at the input and the output, over all calls; capture knows them.
        self.rows_in = self.rows_out = 1
        # Products in one run of the model. Each has its own activation ranges; weights and gate are one.
        self.calls = 1
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.gate: Gate | None = None
        self.x_quant: ActivationQuantizer | None = None
        self.h_quant: ActivationQuantizer | None = None
        self.g_quant: ActivationQuantizer | None = None

    # -- what the passes add ------------------------------------------------------------------------------------

    def add_call(self, number: int, rows_in: int, rows_out: int) -> None:
        """Product ``number`` of the model reads ``rows_in`` and gives ``rows_out`` positions; told twice, it is one."""
        if number == 0:
            self.rows_in, self.rows_out = rows_in, rows_out
        elif number == self.calls:
            self.rows_in, self.rows_out = self.rows_in + rows_in, self.rows_out + rows_out
        self.calls = max(self.calls, number + 1)

    def add_quantizers(self) -> None:
        self.x_quant = ActivationQuantizer(symmetric=False, calls=self.calls)
        for middle in self.middles:
            setattr(self, f"{middle}_quant", ActivationQuantizer(symmetric=True, calls=self.calls))

    def add_gate(self) -> None:
        self.gate = Gate(self.max_rank)

    # -- pieces of the forward of every form --------------------------------------------------------------------

    def _bits(self) -> Tensor:
        return torch.tensor(32.0) if self.gate is None else self.gate.bits

    def _open(self) -> int:
        """How many components are multiplied: a mask shorter than ``max_rank`` closes the rest."""
        return self.max_rank if self.gate is None else len(self.gate.mask)

    def _gated(self, h: Tensor) -> Tensor:
        """Close the components of ``h`` [components, ...] that are beyond the rank in use."""
        if self.gate is None or self.ungated:
            return h
        return h * self.gate.mask[: len(h)].reshape(-1, *[1] * (h.dim() - 1))

    def _quantized(self, name: str, x: Tensor, call: int) -> Tensor:
        if self._floats():
            return x
        rounded: Tensor = getattr(self, f"{name}_quant")(x, self._bits(), call)
        return rounded

    def _floats(self) -> bool:
        """Whether input and middles stay as they are, and no range follows them."""
        quantizer = self.x_quant
        return quantizer is None or self.float_activations or (self.unrounded and not quantizer.training)

    def _rounded(self, factor: Tensor, dim: int | tuple[int, ...], scale: Tensor | None = None) -> Tensor:
        """``factor`` as training sees it, of scale ``scale`` or one scale over ``dim``."""
        if self.x_quant is None or self.unrounded:
            return factor
        scale = weight_scale(factor.detach(), dim) if scale is None else scale
        return fake_quantize_weight(factor, scale, self._bits())

    def _rounded_out(self, u: Tensor) -> tuple[Tensor, Tensor | None]:
        """The last factor [m, R] in units of its component scale, and that scale [R], which the middle carries.

        Where middles are float32 nothing depends on their units: the factor as it is, and None.
        """
        if self._floats():
            return self._rounded(u, 0), None
        scale = weight_scale(u.detach(), 0)
        normalized = u / scale
        if not self.unrounded:
            normalized = fake_quantize_weight(normalized, torch.ones(()), self._bits())
        return normalized, scale[0]

    # -- what each form defines ---------------------------------------------------------------------------------

    def forward(self, x: Tensor, call: int = 0) -> Tensor:
        """``call`` says whose activation ranges these are where the model calls the layer several times."""
        raise NotImplementedError

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Each factor in store layout (rank-major float32) with its scale, broadcastable to it."""
        raise NotImplementedError

    def compose(self, factors: dict[str, Tensor], rank: int) -> Tensor:
        """The dense weight ([m, n] or [O, I/groups, kh, kw]) of float factors in store layout cut at ``rank``."""
        raise NotImplementedError

    def product(self, factors: dict[str, Tensor], x: Tensor, mask: Tensor) -> Tensor:
        """The flattened dense weight times columns: ``x`` [I / groups * kh * kw, n] -> [O, n], never composing it.

        ``factors`` are float factors in store layout, ``mask`` [max_rank, n] closes components (soft values allowed).
        """
        raise NotImplementedError

    def middle_norm(self, middle: str, rank: int) -> float:
        """Operator norm from a middle tensor (in its quantizer's units) to the layer's output at ``rank``."""
        raise NotImplementedError

    def scales(self) -> dict[str, Tensor]:
        """The float32 vectors the deployed op takes beside the factors, at max rank."""
        raise NotImplementedError

    def geometry(self) -> dict[str, Any]:
        """Stride, padding and the like, as the deployed op names them."""
        return {}

    # -- the same for all ---------------------------------------------------------------------------------------

    def dense_shape(self) -> tuple[int, ...]:
        """Shape of the weight the factors stand for: [m, n] or [O, I / groups, kh, kw]."""
        empty = {name: factor.detach().to("meta") for name, (factor, _) in self.factors().items()}
        return tuple(self.compose(empty, self.max_rank).shape)

    def dense_weight(self, option: Option | None = None) -> Tensor:
        """The weight this layer multiplies by: exact when ``option`` is None, else at that rank and width."""
        factors = self.factors()
        if option is None or option.bits == 32:
            rank = self.max_rank if option is None else option.rank
            return self.compose({name: factor for name, (factor, _) in factors.items()}, rank)
        return self.compose(self.rounded_factors(torch.tensor(float(option.bits))), option.rank)

    def rounded_factors(self, bits: Tensor) -> dict[str, Tensor]:
        """The factors in store layout as training sees them at width ``bits`` (0-d); straight-through gradients."""
        return {
            name: fake_quantize_weight(factor, scale.detach(), bits) for name, (factor, scale) in self.factors().items()
        }

    @torch.no_grad()
    def store(self, rank: int) -> dict[str, Tensor]:
        """Deployed tensors cut at ``rank``: int8 factors, float32 scales and bias; smaller ranks are prefixes."""
        tensors = {
            name: quantize_weight(factor, scale).to(torch.int8) for name, (factor, scale) in self.factors().items()
        }
        tensors |= self.scales()
        if self.bias is not None:
            tensors["bias"] = self.bias.detach()
        return {name: self._cut(name, tensor, rank).contiguous().clone() for name, tensor in tensors.items()}

    def _cut(self, name: str, tensor: Tensor, rank: int) -> Tensor:
        """The prefix of one stored tensor; all but the bias are rank-major."""
        return tensor if name == "bias" else tensor[:rank]

    def activations(self) -> dict[str, Activation]:
        """Scale and zero point of input (``x``; of the second call, ``x.1``) and middles, from the quantizers.

        Empty where activations stay float32.
        """
        found: dict[str, Activation] = {}
        if self.float_activations:
            return found
        for name in ("x", *self.middles):
            quantizer: ActivationQuantizer | None = getattr(self, f"{name}_quant")
            if quantizer is None:
                raise ValueError("the layer has no quantizers: run the insert-quantizers pass first")
            for call in range(self.calls):
                found[of_call(name, call)] = (float(quantizer.scale[call]), int(quantizer.zero_point[call]))
        return found

    def set_activations(self, activations: dict[str, Activation]) -> None:
        """Put back what :meth:`activations` returned."""
        for key, (scale, zero_point) in activations.items():
            name, _, call = key.partition(".")
            quantizer = getattr(self, f"{name}_quant")
            quantizer.scale[int(call or 0)] = scale
            quantizer.zero_point[int(call or 0)] = zero_point

    def extra_repr(self) -> str:
        return f"form={self.form}, max_rank={self.max_rank}"


def elastic_layers(model: nn.Module) -> Iterator[tuple[str, ElasticLayer]]:
    """The elastic layers of a model with their qualified names, in module order."""
    for name, module in model.named_modules():
        if isinstance(module, ElasticLayer):
            yield name, module


@contextmanager
def full_width_known(elastic: nn.Module) -> Iterator[None]:
    """Inside, layers at 32 bits use their weights as they are, and fully open ones their components. Else each makes
    copies, for a compiled graph cannot ask how wide a layer is. No gate may change meanwhile."""
    layers = [layer for _, layer in elastic_layers(elastic)]
    for layer in layers:
        layer.unrounded = layer.gate is None or float(layer.gate.bits) >= 32
        layer.ungated = layer.gate is None or bool((layer.gate.mask == 1).all())
    try:
        yield
    finally:
        for layer in layers:
            layer.unrounded = layer.ungated = False


def first(tensor: Tensor, count: int, dim: int = 0) -> Tensor:
    """The first ``count`` along ``dim``: all of them without a view, whose gradient would be a copy."""
    return tensor if count >= tensor.shape[dim] else tensor.narrow(dim, 0, count)
