"""Products on AMX: with the unit emulated on any processor, and where there is one, on it, too."""

import ctypes
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from kernel_cases import Case, build_cases, calls_for, compile_cases, run_calls
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends import cpu
from t3c_compile.backends.targets import get_target
from t3c_compile.backends.tvm.kernels import amx
from t3c_compile.backends.tvm.kernels.isa import QUAD, Isa, isa_for
from t3c_compile.backends.tvm.kernels.tile import Tile
from t3c_compile.backends.tvm.tuning.workload import Workload

AMX = get_target("x86_64-amx")
# Those whose products have rows enough for the unit.
CASES = [case for case in build_cases() if case.spec and Workload(isa_for(AMX), case.spec).products({})]
CASES = [case for case in CASES if all(p.isa.matrices for p in Workload(isa_for(AMX), case.spec).products({}))]


def _dot(acc: Expr, activations: Expr, weights: Expr) -> Expr:
    """What ``vpdpbusd`` does, in operations that every processor has."""

    def byte(values: Expr, k: int) -> Expr:
        return T.cast(T.Shuffle([values], list(range(k, QUAD * 16, QUAD))), "int32x16")

    for k in range(QUAD):
        acc = acc + byte(activations, k) * byte(weights, k)
    return acc


@pytest.fixture
def emulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Isa:
    """AMX's instruction set with calls into the emulator for its instructions."""
    library, source = tmp_path / "libamx.so", Path(__file__).with_name("amx_emulator.c")
    subprocess.run(["gcc", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, source], check=True)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)

    def instruction(name: str, *arguments: Expr | int) -> None:
        given = [T.int8(a) if isinstance(a, int) else a for a in arguments]
        T.evaluate(T.call_extern("void", f"t3c_{name}", *given))

    monkeypatch.setattr(amx, "instruction", instruction)
    # The kernels are made once for each instruction set: this one is another.
    return replace(isa_for(AMX), dot=_dot, name="emulated amx")


def check(cases: list[Case], target: str, folder: Path, isa: Isa | None = None) -> None:
    compile_cases(cases, target, folder / "kernels.so", isa)
    calls = calls_for(cases, target, isa)
    for case, result in zip(cases, run_calls(folder / "kernels.so", calls), strict=True):
        np.testing.assert_array_equal(result, case.expected, err_msg=case.call.name)


def test_kernels_on_the_emulator(emulated: Isa, tmp_path: Path) -> None:
    assert len(CASES) > 25
    check(CASES, "x86_64", tmp_path, emulated)


@pytest.mark.parametrize("tile", [Tile(9, 5, 9), Tile(16, 1, 64), Tile(26, 2, 48), Tile(48, 1, 32)], ids=str)
def test_tiles_on_the_emulator(emulated: Isa, tile: Tile, tmp_path: Path) -> None:
    """Ragged heights, one to three registers high, in several chunks."""
    chosen = [case for case in CASES if case.call.name.startswith(("int8_linear", "tucker2", "int8_conv2d"))][::3]

    def tiled(case: Case) -> Case:
        def kernel(isa: Isa) -> object:
            return Workload(isa, case.spec).kernel((tile,) * len(Workload(isa, case.spec).products({})))

        return replace(case, kernel=kernel)

    check([tiled(case) for case in chosen], "x86_64", tmp_path, emulated)


def test_the_emulator_sees_a_wrong_sign(emulated: Isa, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The comparison can fail: unsigned activations multiplied as signed ones are seen."""
    add_products = amx.add_products
    monkeypatch.setattr(amx, "add_products", lambda *registers: add_products(*registers[:3], "int8"))
    chosen = [case for case in CASES if case.call.activations][:1]
    with pytest.raises(AssertionError):
        check(chosen, "x86_64", tmp_path, replace(emulated, name="wrong"))


def test_every_case_has_the_instruction() -> None:
    for case in CASES[::4]:
        assembly = compile_cases([case], AMX.name).inspect_source("asm")
        for name in ("ldtilecfg", "tdpb", "tilerelease"):
            assert name in assembly, case.call.name


@pytest.mark.skipif(not cpu.features().issuperset(AMX.features), reason="this processor has no AMX")
def test_kernels_on_the_unit(tmp_path: Path) -> None:
    check(CASES, AMX.name, tmp_path)


def test_permission_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Linux refuses the registers, the processor counts as one without AMX."""
    asked = []

    class Kernel:
        def syscall(self, *arguments: int) -> int:
            asked.append(arguments)
            return -1

    text = "flags\t\t: avx2 avx512_vnni amx_tile amx_int8\n"
    monkeypatch.setattr(cpu.Path, "read_text", lambda path: text)
    monkeypatch.setattr(cpu.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(cpu.ctypes, "CDLL", lambda name: Kernel())
    assert cpu.features() == {"avx2", "avx512_vnni"}
    assert asked == [(158, 0x1023, 18)]
