"""Every kernel against the torch reference of its op, run from a compiled library; and the instructions it must use."""

import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tvm
from kernel_cases import (
    Array,
    Case,
    build_cases,
    calls_for,
    compile_cases,
    compile_module,
    pack_numpy,
    run_calls,
    save_calls,
)
from tvm import te

from t3c_compile.backends import cpu
from t3c_compile.backends.targets import get_target
from t3c_compile.backends.tvm.default_schedule import schedule_default
from t3c_compile.backends.tvm.kernels import pack, quantize, vmath
from t3c_compile.backends.tvm.kernels.isa import isa_for
from t3c_compile.passes.ops import DEPLOYMENT_OPS

CASES = build_cases()
# A host that is no better than AVX2 is tested once.
HOST_TARGETS = ("x86_64",) if get_target("x86_64").simd == "avx2" else ("x86_64", "x86_64-v3")
# The other levels with dot products: a part of the cases, where the processor has them.
BETWEEN = [name for name in ("x86_64-avxvnni", "x86_64-vnni") if get_target(name).simd != get_target("x86_64").simd]


def assert_equal(case: Case, result: Array) -> None:
    """To the bit."""
    np.testing.assert_array_equal(result, case.expected, err_msg=case.call.name)


@pytest.fixture(scope="module", params=HOST_TARGETS)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Array]:
    path = tmp_path_factory.mktemp("kernels") / f"{request.param}.so"
    compile_cases(CASES, request.param, path)
    return dict(zip((c.call.name for c in CASES), run_calls(path, calls_for(CASES, request.param)), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.call.name)
def test_kernel_equals_reference(case: Case, results: dict[str, Array]) -> None:
    assert_equal(case, results[case.call.name])


@pytest.mark.parametrize("name", [name for name in BETWEEN if cpu.features().issuperset(get_target(name).features)])
def test_kernels_on_levels_below(name: str, tmp_path: Path) -> None:
    chosen = CASES[::3]
    compile_cases(chosen, name, tmp_path / "kernels.so")
    for case, result in zip(chosen, run_calls(tmp_path / "kernels.so", calls_for(chosen, name)), strict=True):
        assert_equal(case, result)


def test_every_deployment_op_has_a_case() -> None:
    covered = {case.call.name.rpartition("_")[0] for case in CASES}
    assert covered == {op.removesuffix("_int8") for op in DEPLOYMENT_OPS}


def test_a_wrong_step_in_the_middle_is_seen() -> None:
    """The comparison can fail: one output off by one int8 step of its input is reported."""
    case = next(c for c in CASES if c.call.name.startswith("svd_linear"))
    wrong = case.expected.copy()
    wrong.reshape(-1)[3] += np.float32(np.abs(case.expected).max() * 1e-4)
    with pytest.raises(AssertionError):
        assert_equal(case, wrong)


@pytest.mark.parametrize(
    "packing",
    [
        pack.words_of_matrix(isa_for(get_target("arm64")), (33, 18)),
        pack.words_of_matrix(isa_for(get_target("neoverse-v2")), (9, 41), transposed=True),
        pack.words_of_conv(isa_for(get_target("arm64")), (12, 5, 3, 3), groups=2),
        replace(pack.words_of_matrix(isa_for(get_target("x86_64-vnni")), (33, 18)), bits=6),
        replace(pack.lanes_of_depthwise((33, 1, 3, 3)), bits=4),
        pack.words_of_conv(isa_for(get_target("neoverse-v2")), (12, 9, 3, 3), groups=2),
        pack.lanes_of_matrix((20, 7), "float32"),
        pack.lanes_of_matrix((9, 40), "int8", transposed=True),
        pack.nibbles_of_matrix((33, 18)),
        pack.nibbles_of_matrix((9, 40), transposed=True),
    ],
    ids=lambda p: f"{p.layout}{p.raw_shape}",
)
def test_pack_kernel(packing: pack.Packing) -> None:
    raw = (np.arange(np.prod(packing.raw_shape)) % 239 - 119).astype(packing.dtype).reshape(packing.raw_shape)
    kernel = pack.pack(packing).with_attr("global_symbol", "pack")
    module = compile_module({"pack": kernel}, get_target("x86_64"))
    packed = tvm.runtime.tensor(np.ones(packing.shape, packing.dtype))
    module["pack"](tvm.runtime.tensor(raw), packed)
    np.testing.assert_array_equal(packed.numpy(), pack_numpy(packing, raw))


@pytest.mark.parametrize(
    ("target", "instruction"),
    [
        ("neoverse-v2", "smmla"),
        ("cortex-a76", "sdot"),
        ("arm64", "smull"),
        ("x86_64-v3", "vpmaddubsw"),
        ("x86_64-avxvnni", "vpdpbusd"),
        ("x86_64-vnni", "vpdpbusd"),
    ],
)
def test_dot_product_instruction(target: str, instruction: str) -> None:
    kinds = ("int8_linear", "svd_linear", "int8_conv2d", "tucker2_conv2d")
    chosen = [next(c for c in CASES if c.call.name.startswith(kind)) for kind in kinds]
    for case in chosen:
        assert instruction in compile_cases([case], target).inspect_source("asm"), case.call.name
    # Digits of a row are rows of their own, and so single.
    single = "sdot" if instruction == "smmla" else instruction
    for kind in ("weight_only_linear", "svd_weight_only_linear"):
        case = next(c for c in CASES if c.call.name.startswith(kind))
        assert single in compile_cases([case], target).inspect_source("asm"), case.call.name


def test_sdot_takes_activations_by_lane() -> None:
    """Whole vectors of a row are loaded, and no word is spread over a register of its own."""
    case = next(c for c in CASES if c.spec and c.call.args[0].shape == (100, 129))
    assembly = compile_cases([case], "cortex-a76").inspect_source("asm")
    for lane in range(4):
        assert len(re.findall(rf"sdot\s+v\d+\.4s, v\d+\.16b, v\d+\.4b\[{lane}\]", assembly)) >= 20


def test_host_uses_vnni_where_it_has_it() -> None:
    if get_target("x86_64").simd not in ("amx", "avx512vnni"):
        pytest.skip("this host has no AVX512-VNNI")
    case = next(c for c in CASES if c.call.name.startswith("int8_linear"))
    assert "vpdpbusd" in compile_cases([case], "x86_64").inspect_source("asm")


@pytest.mark.parametrize(
    ("target", "cpu"), [("arm64", "cortex-a53"), ("cortex-a76", "cortex-a76"), ("neoverse-v2", "max")]
)
def test_kernels_on_arm64(arm64: ModuleType, target: str, cpu: str, tmp_path: Path) -> None:
    library, calls, results = tmp_path / "kernels.so", tmp_path / "calls.npz", tmp_path / "results.npz"
    compile_cases(CASES, target, library)
    save_calls(calls, calls_for(CASES, target))
    script = Path(__file__).with_name("kernel_cases.py")
    done = arm64.run_python([str(script), str(library), str(calls), str(results)], cpu=cpu)
    assert done.returncode == 0, done.stderr
    computed = np.load(results)
    for i, case in enumerate(CASES):
        assert_equal(case, computed[f"arr_{i}"])


@pytest.mark.parametrize("function", ["quantize", "gelu", "silu", "tanh", "exp"])
def test_elementwise_code_is_vectorized(function: str) -> None:
    """No call to libm an element, and arithmetic on whole vectors."""
    x = te.placeholder((3, 64, 768), "float32", name="x")
    numbers = te.placeholder((2,), "float32", name="numbers")
    if function == "quantize":
        arguments = [x, numbers, quantize.quantize(x, numbers)]
    else:
        arguments = [x, te.compute(x.shape, lambda *i: getattr(vmath, function)(x(*i)))]
    kernel = schedule_default(te.create_prim_func(arguments), 8).with_attr("global_symbol", "f")
    assembly = compile_module({"f": kernel}, get_target("x86_64-v3")).inspect_source("asm")
    body = assembly[assembly.index("f_compute_") :]
    assert "%ymm" in body
    assert not re.search(r"call\w*\s+\*?\S*(exp|erf|tanh|rint|nearbyint)", body)
    assert "vmulss" not in body
