"""The kernel that an elastic layer is at an option, without a model around it."""

from collections.abc import Sequence

from t3c_compile.backends.tvm.kernels.conv import MOST_PLANES, ChainSpec, ConvSpec
from t3c_compile.backends.tvm.kernels.isa import Isa
from t3c_compile.backends.tvm.kernels.linear import LinearSpec
from t3c_compile.backends.tvm.kernels.window import Window
from t3c_compile.backends.tvm.tuning.workload import Spec, Workload
from t3c_compile.passes.elastic import DenseConv2d, ElasticLayer, SvdConv2d, Table
from t3c_compile.passes.elastic.conv import ConvGeometry, ThreeFactorConv2d

_BITS = 8  # times are taken for all widths alike, as tiles are


def is_integer_product(layer: ElasticLayer) -> bool:
    """All layers but tables of rows and those with float32 activations."""
    return not isinstance(layer, Table) and not layer.float_activations


def layer_workload(isa: Isa, layer: ElasticLayer, rank: int, shape: Sequence[int | str]) -> Workload:
    """The kernel of ``layer`` at ``rank`` (0: dense) on an input of ``shape``, [..., n] or [N, C, H, W]; a name
    is a symbolic size.
    """
    return Workload(isa, (_conv if len(layer.dense_shape()) == 4 else _linear)(layer, rank, tuple(shape)))


def _linear(layer: ElasticLayer, rank: int, shape: tuple[int | str, ...]) -> Spec:
    outputs, inputs = layer.dense_shape()
    max_rank, bias = layer.max_rank if rank else 0, layer.bias is not None
    return LinearSpec(shape[:-1], inputs, outputs, _BITS, bias=bias, max_rank=max_rank, rank=rank)


def _conv(layer: ElasticLayer, rank: int, shape: tuple[int | str, ...]) -> Spec:
    batch, *sizes = shape
    channels, height, width = map(int, sizes)
    outputs, _, *kernel = layer.dense_shape()
    assert isinstance(layer, SvdConv2d | DenseConv2d | ThreeFactorConv2d)
    conv: ConvGeometry = layer.conv
    window = Window((height, width), (kernel[0], kernel[1]), conv.stride, conv.padding, conv.dilation)
    bias, planes = layer.bias is not None, channels <= MOST_PLANES
    if not rank:
        groups = layer.groups if isinstance(layer, DenseConv2d) else 1
        return ConvSpec(batch, channels, outputs, window, groups, _BITS, bias, planes=planes)
    ranks = (layer.max_rank, layer.max_rank)
    if isinstance(layer, ThreeFactorConv2d):
        ranks = layer.V.shape[0], layer.U.shape[1]
    return ChainSpec(
        layer.form, batch, channels, outputs, window, ranks, rank, _BITS, gain=False, bias=bias, planes=planes
    )
