"""Float stages: exact references, their accuracy, kernels equal to them bit for bit on every target, and the pass."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import tvm
from float_cases import INFINITY, build_float_cases, hard_values
from kernel_cases import Array, Case, compile_cases, run_calls, save_calls
from nets import packed
from torch import Tensor, nn
from torch.nn import functional
from tvm.runtime import vm as runtime

from t3c_compile.backends.targets import get_target
from t3c_compile.backends.tvm.build import build_library
from t3c_compile.passes import ops
from t3c_compile.passes.ops import float_math
from t3c_compile.passes.ops.float_math import TORCH
from t3c_compile.passes.pin_float_stages import PinFloatStages

CASES = build_float_cases()
t3c = torch.ops.t3c


def assert_same_bits(found: Array, expected: Array, what: str, dtype: str = "float32") -> None:
    assert found.dtype == expected.dtype == np.dtype(dtype)
    whole = f"int{8 * expected.itemsize}"
    same = (found.view(whole) == expected.view(whole)) | (np.isnan(found) & np.isnan(expected))
    assert same.all(), (what, found[~same][:5], expected[~same][:5])


@pytest.mark.parametrize("target", ["x86_64", "x86_64-v3"])
def test_kernels_equal_the_reference_bit_for_bit(target: str, tmp_path: Path) -> None:
    compile_cases(CASES, target, tmp_path / "floats.so")
    for case, found in zip(CASES, run_calls(tmp_path / "floats.so", [c.call for c in CASES]), strict=True):
        assert_same_bits(found, case.expected, case.call.name, case.call.dtype)


# Of kernels on i8mm, those that have int8 products: all else is compiled as for any arm64.
@pytest.mark.parametrize(
    ("target", "cpu", "prefix"), [("arm64", "cortex-a53", ""), ("neoverse-v2", "max", "attention_int8")]
)
def test_kernels_equal_the_reference_on_arm64(
    arm64: ModuleType, tmp_path: Path, target: str, cpu: str, prefix: str
) -> None:
    files = [tmp_path / name for name in ("floats.so", "calls.npz", "results.npz")]
    cases = [case for case in CASES if case.call.name.startswith(prefix)]
    compile_cases(cases, target, files[0])
    save_calls(files[1], [case.call for case in cases])
    script = Path(__file__).with_name("kernel_cases.py")
    done = arm64.run_python([str(script), *map(str, files)], cpu=cpu)
    assert done.returncode == 0, done.stderr
    with np.load(files[2]) as computed:
        assert cases
        for i, case in enumerate(cases):
            assert_same_bits(computed[f"arr_{i}"], case.expected, case.call.name, case.call.dtype)


def test_every_op_has_a_case() -> None:
    covered = {case.call.name.rpartition("_")[0].removesuffix("_f32") for case in CASES}
    assert covered == {op.removesuffix("_f32") for op in ops.FLOAT_OPS} | {"max_pool2d"}


def test_a_difference_in_the_last_place_is_seen() -> None:
    case: Case = next(c for c in CASES if c.call.name.startswith("matmul"))
    wrong = case.expected.copy()
    wrong.reshape(-1)[3] = np.nextafter(wrong.reshape(-1)[3], np.float32(9))
    with pytest.raises(AssertionError):
        assert_same_bits(wrong, case.expected, "one")


def nearest(value: Fraction) -> float:
    """float32 nearest to ``value``, ties to even, found among the neighbours of a first guess."""
    guess = np.float32(float(value))
    near = [guess, np.nextafter(guess, np.float32(np.inf)), np.nextafter(guess, np.float32(-np.inf))]
    return float(min(near, key=lambda x: (abs(Fraction(float(x)) - value), int(np.float32(x).view(np.int32)) & 1)))


def test_fma_rounds_once() -> None:
    """Against exact fractions, where rounding to float64 first goes wrong too."""
    torch.manual_seed(0)
    a = torch.randn(3000) * torch.exp2(torch.randint(-60, 60, (3000,)).float())
    b, c = torch.randn(3000), torch.randn(3000)
    # The product ends just below or above the middle between two float32 numbers, far below float64's last place.
    small = 2.0**-24 * torch.tensor([1 + 2.0**-23, 1 - 2.0**-23, 1 + 2.0**-23, 1.0])
    other = torch.tensor([1 - 2.0**-23, 1 + 2.0**-23, 1 + 2.0**-23, 1.0])
    added = torch.tensor([1 + 2.0**-23, 1.0, 1.0, 1.0])
    a, b, c = torch.cat([a, small]), torch.cat([b, other]), torch.cat([c, added])
    found = float_math.fma(a, b, c)
    exact = [
        nearest(Fraction(x) * Fraction(y) + Fraction(z)) for x, y, z in zip(*map(Tensor.tolist, (a, b, c)), strict=True)
    ]
    assert found.tolist() == exact
    twice = (a.double() * b.double() + c.double()).float()
    assert found[3000] != twice[3000]


def test_sqrt_is_the_nearest() -> None:
    x = torch.rand(20000) * 5
    np.testing.assert_array_equal(float_math.sqrt(x).numpy(), np.sqrt(x.numpy()))


# Greatest error in units of the last place against float64, over the range where the result is a normal number.
ACCURACY: dict[str, tuple[Callable[[Tensor], Tensor], float, tuple[float, float]]] = {
    "exp": (torch.exp, 1.0, (-87.3, 88.72)),
    "fast_exp": (torch.exp, 1.0, (-87.3, 88.37)),
    "erf": (torch.erf, 8.0, (-INFINITY, INFINITY)),
    "tanh": (torch.tanh, 3.5, (-INFINITY, INFINITY)),
    "sigmoid": (torch.sigmoid, 3.0, (-87.3, INFINITY)),
    "silu": (functional.silu, 3.0, (-80.0, INFINITY)),
}


@pytest.mark.parametrize("name", ACCURACY)
def test_accuracy(name: str) -> None:
    function, most, (low, high) = ACCURACY[name]
    torch.manual_seed(1)
    x = torch.cat([hard_values(), torch.linspace(-100, 90, 200_001), torch.randn(200_000) * 3])
    x = x[(x >= low) & (x <= high) & x.isfinite() & (x.abs() > 1e-30)]
    exact = function(x.double())
    nearby = exact.float().abs()
    step = torch.nextafter(nearby, torch.tensor(INFINITY)).double() - nearby.double()
    error = (getattr(float_math, name)(TORCH, x).double() - exact).abs() / step
    assert float(error.max()) <= most


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_accuracy(approximate: str) -> None:
    """In units of x's last place: for negative x the terms cancel, in torch too."""
    x = torch.cat([torch.linspace(-12, 12, 200_001), torch.randn(200_000)])
    exact = functional.gelu(x.double(), approximate=approximate)
    found = t3c.gelu_tanh_f32(x) if approximate == "tanh" else t3c.gelu_f32(x)
    assert float(((found.double() - exact).abs() / (x.double().abs() + 1e-30)).max()) <= 4 * 2.0**-24


def test_values_at_the_ends() -> None:
    ends = torch.tensor([INFINITY, -INFINITY, float("nan"), 200.0, -200.0])
    for name, function in (("exp", torch.exp), ("tanh", torch.tanh), ("erf", torch.erf), ("sigmoid", torch.sigmoid)):
        torch.testing.assert_close(
            getattr(t3c, f"{name}_f32")(ends), function(ends), rtol=0, atol=1e-38, equal_nan=True
        )


def samples() -> dict[str, tuple[object, ...]]:
    torch.manual_seed(2)
    x = torch.randn(3, 4, 35) * 2
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 13, 8), torch.randn(2, 2, 13, 5)
    mask = (torch.rand(2, 1, 9, 13) > 0.4).index_fill(2, torch.tensor([3]), False)
    return {
        **{
            name: (x,)
            for name in ops.FLOAT_OPS
            if not name.startswith(("layer", "rms", "softmax", "mean", "mat", "att"))
        },
        "layer_norm_f32": (x, torch.randn(35), torch.randn(35), 1e-5),
        "rms_norm_f32": (x, torch.randn(35), 1e-6),
        "softmax_f32": (x,),
        "mean_f32": (x, [0, 2], True),
        "matmul_f32": (x, torch.randn(4, 1, 35, 6).squeeze(1)[:1]),
        "attention_f32": (q, k, v, mask, False, 0.3),
        "attention_int8": (q, k, v, mask, False, 0.3),
    }


@pytest.mark.parametrize("name", ops.FLOAT_OPS)
def test_op_is_well_formed_and_means_what_aten_does(name: str) -> None:
    """Schema and fake kernel by torch's checker; the reference against the ATen meaning, all-masked rows included."""
    op, arguments = getattr(t3c, name).default, samples()[name]
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
    torch.testing.assert_close(op(*arguments), ops.FLOAT_ATEN[op](*arguments), rtol=3e-6, atol=3e-6)


def test_attention_accuracy() -> None:
    """Against float64, with masks, causal, and scores so large that one key takes all."""
    torch.manual_seed(3)
    for size, causal in ((1.0, False), (30.0, False), (1.0, True)):
        q, k, v = torch.randn(2, 3, 50, 16) * size, torch.randn(2, 3, 50, 16), torch.randn(2, 3, 50, 16)
        mask = None if causal else torch.where(torch.rand(50, 50) > 0.3, 0.0, -INFINITY)
        exact = functional.scaled_dot_product_attention(
            q.double(), k.double(), v.double(), None if mask is None else mask.double(), is_causal=causal
        )
        error = (t3c.attention_f32(q, k, v, mask, causal, 0.25).double() - exact).abs().max()
        plain = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal).double()
        assert float(error) <= max(2e-6, 2 * float((plain - exact).abs().max()))


class Stages(nn.Module):
    """Every float stage, with attention as one op and as written by hand; no two roundings may merge."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.rms = nn.LayerNorm(24), nn.RMSNorm(24)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        heads = self.norm(x).unflatten(-1, (3, 8)).transpose(1, 2)
        fused = functional.scaled_dot_product_attention(heads, heads * 0.7, heads, mask[:, None, None])
        causal = functional.scaled_dot_product_attention(heads[:, 0], heads[:, 1], heads[:, 2], is_causal=True)
        weights = torch.softmax(torch.matmul(heads, heads.transpose(-1, -2)) * 0.3, -1)
        y = x + (fused + torch.matmul(weights, heads)).transpose(1, 2).flatten(2)
        y = self.rms(y) * 1.7 + x
        y = self.act(y * 0.9) + torch.tanh(y) * torch.sigmoid(x) + functional.gelu(y, approximate="tanh")
        y = y + functional.gelu(y) * y + torch.softmax(y, 1) * torch.exp(-torch.erf(y))
        pooled = functional.adaptive_avg_pool1d(y.transpose(1, 2), 1).flatten(1)
        return torch.cat([y.mean(1) * 0.3 + pooled, y.mean((0, 2))[:1].expand(x.shape[0], 1), causal.mean(1)], 1)


@pytest.fixture(scope="module")
def pinned() -> torch.fx.GraphModule:
    batch, tokens = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("tokens", min=2, max=512)
    example = (torch.randn(2, 13, 24), torch.ones(2, 13, dtype=torch.bool))
    shapes = ({0: batch, 1: tokens}, {0: batch, 1: tokens})
    program = torch.export.export(Stages().eval(), example, dynamic_shapes=shapes)
    graph = program.module(check_guards=False)
    PinFloatStages()(graph)  # type: ignore[arg-type]
    return graph  # type: ignore[return-value]


def test_every_stage_is_pinned_and_means_the_same(pinned: torch.fx.GraphModule) -> None:
    targets = [str(node.target) for node in pinned.graph.nodes if node.op == "call_function"]
    assert {t.split(".")[1] for t in targets if t.startswith("t3c.")} == set(ops.FLOAT_OPS) - {"attention_int8"}
    left = ("softmax", "attention", "matmul", "norm", "mean", "pool", "silu", "gelu", "tanh", "exp.", "erf")
    assert not [t for t in targets if t.startswith("aten.") and any(word in t for word in left)]
    torch.manual_seed(4)
    x, mask = torch.randn(3, 29, 24), torch.rand(3, 29) > 0.3
    torch.testing.assert_close(pinned(x, mask), Stages().eval()(x, mask), rtol=1e-5, atol=1e-5)


def test_pinned_graph_is_bit_equal_with_any_batch_and_length(pinned: torch.fx.GraphModule, tmp_path: Path) -> None:
    """On one target: kernels of each, with sizes free too, are held against the reference above."""
    batch, tokens = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("tokens", min=2, max=512)
    example = (torch.randn(2, 13, 24), torch.ones(2, 13, dtype=torch.bool))
    program = torch.export.export(pinned, example, dynamic_shapes=({0: batch, 1: tokens}, {0: batch, 1: tokens}))
    library = build_library({"main": program}, get_target("x86_64"), tmp_path / "stages.so")
    machine = runtime.VirtualMachine(tvm.runtime.load_module(str(library.path)), tvm.cpu())
    state = program.state_dict
    tensors = packed(machine, library, state)
    torch.manual_seed(5)
    for count, length in ((1, 2), (2, 13), (3, 50), (1, 130)):
        x, mask = torch.randn(count, length, 24) * 3, torch.rand(count, length) > 0.4
        found = machine["main"](tvm.runtime.tensor(x.numpy()), tvm.runtime.tensor(mask.numpy()), tensors).numpy()
        assert_same_bits(found, pinned(x, mask).detach().numpy(), f"{count} {length}")


def test_other_dtypes_stay_as_they_are() -> None:
    program = torch.export.export(nn.Softmax(-1), (torch.randn(2, 3, dtype=torch.float64),))
    graph = program.module(check_guards=False)
    assert not PinFloatStages()(graph).modified  # type: ignore[arg-type]
