"""How near arm64's int8 kernels come to the speed of their dot products alone: ``python -m benchmarks.arm64_loops``.

Each kernel is compiled for its target, and each loop that fills a register tile is given to ``llvm-mca`` (LLVM 17 or
later; Debian: ``apt-get install llvm-19``), which simulates it by the scheduling model LLVM has of a core, all data in
the first-level cache. ``throughput`` is the share that the loop reaches of what the model allows all its instructions,
``share`` of what it allows its sdot or smmla alone, and ``tile`` the most that a tile of that shape can reach of the
latter. Prints a table and writes ``benchmarks/results/arm64_loops.json``.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import tvm

from t3c_compile.backends.targets import get_target
from t3c_compile.backends.tvm.kernels import conv, linear
from t3c_compile.backends.tvm.kernels.isa import Isa, isa_for
from t3c_compile.backends.tvm.kernels.window import Window
from t3c_compile.backends.tvm.pipelines import KERNEL_PIPELINE
from t3c_compile.show import show

RESULTS = Path(__file__).parent / "results/arm64_loops.json"
# By target: the instruction, and the cores whose models are asked. LLVM has none of the Cortex-A76 itself and takes the
# A57's, which loads one vector a cycle where the A76 loads two.
_CORES = {
    "cortex-a76": ("sdot", ("cortex-a76", "neoverse-n1")),
    "neoverse-v2": ("smmla", ("neoverse-v1", "neoverse-v2")),
}
_ITERATIONS = 200


def _square(size: int, kernel: int) -> Window:
    return Window((size, size), (kernel, kernel), (1, 1), (kernel // 2, kernel // 2), (1, 1))


def kernels(isa: Isa) -> dict[str, Any]:
    """GEMMs and convolutions by name: rows, inputs -> outputs and bits, or channels and image size."""
    gemms = {
        f"gemm {rows} x {inputs}->{outputs}, {bits} bits": linear.int8_linear(
            isa, linear.LinearSpec((rows,), inputs, outputs, bits, bias=True)
        )
        for rows, inputs, outputs in ((384, 256, 256), (384, 768, 100), (49, 256, 256), (4, 256, 256), (1, 256, 256))
        for bits in (8, 4)
    }
    convs = {
        f"conv {kernel}x{kernel} {channels}->{outputs}, {size}x{size}, {bits} bits": conv.int8_conv2d(
            isa, conv.ConvSpec(1, channels, outputs, _square(size, kernel), 1, bits, bias=True)
        )
        for kernel, channels, outputs, size in ((3, 64, 64, 56), (3, 512, 512, 7), (1, 256, 64, 56), (3, 32, 40, 14))
        for bits in (8, 4)
    }
    chains = {
        "svd 384 x 256->96->256, 8 bits": linear.svd_linear(
            isa, linear.LinearSpec((384,), 256, 256, 8, max_rank=128, rank=96)
        ),
        "tucker2 3x3 128->48->48->128, 28x28, 8 bits": conv.conv_chain(
            isa, conv.ChainSpec("tucker2", 1, 128, 128, _square(28, 3), (64, 64), 48, 8, gain=False, bias=True)
        ),
    }
    return gemms | convs | chains


def tile_loops(assembly: str, instruction: str) -> list[list[str]]:
    """The innermost loops that add to the most registers, each once: those of the kernel's whole register tiles."""
    found = []
    parts = re.split(r"^(\.LBB\w+):.*$", assembly, flags=re.MULTILINE)
    for label, body in zip(parts[1::2], parts[2::2], strict=True):
        lines = [line.partition("//")[0].strip() for line in body.splitlines()]
        code = [line for line in lines if line and not line.startswith(".")]
        back = [i for i, line in enumerate(code) if re.match(rf"(b\.|cb|tb)\w+\s.*{re.escape(label)}$", line)]
        if back:
            found.append(code[: back[0] + 1])
    sums = [len({line.split()[1] for line in code if line.startswith(instruction)}) for code in found]
    whole = [code for code, count in zip(found, sums, strict=True) if count == max(sums)]
    return list({tuple(line.split()[0] for line in code): code for code in whole}.values())


def _llvm_mca() -> str:
    names = [*(f"llvm-mca-{version}" for version in range(30, 16, -1)), "llvm-mca"]
    path = next((path for name in names if (path := shutil.which(name))), None)
    if path is None:
        raise SystemExit("llvm-mca is not installed (on Debian: apt-get install llvm-19)")
    return path


def simulate(code: list[str], core: str) -> tuple[float, float]:
    """Cycles an iteration of ``code`` as a loop, and the least that the units and the front end allow."""
    command = [_llvm_mca(), "-mtriple=aarch64", f"-mcpu={core}", f"-iterations={_ITERATIONS}"]
    done = subprocess.run(command, input="\n".join(code), capture_output=True, text=True, check=False)
    if done.returncode or "not a recognized processor" in done.stderr:
        raise SystemExit(f"llvm-mca for {core} failed:\n{done.stderr}")
    cycles, least = (
        float(re.search(rf"{name}:\s+([\d.]+)", done.stdout)[1])  # type: ignore[index]
        for name in ("Total Cycles", "Block RThroughput")
    )
    return cycles / _ITERATIONS, least


def main() -> None:
    rows = []
    for target_name, (instruction, cores) in _CORES.items():
        target = get_target(target_name)
        for name, kernel in kernels(isa_for(target)).items():
            module = tvm.IRModule({"kernel": kernel.with_attr("global_symbol", "kernel")})
            built = tvm.tirx.build(module, target=tvm.target.Target(dict(target.tvm)), pipeline=KERNEL_PIPELINE)
            for code in tile_loops(built.inspect_source("asm"), instruction):
                dots = [line for line in code if line.startswith(instruction)]
                for core in cores:
                    cycles, least = simulate(code, core)
                    bound = simulate(dots, core)[1]
                    rows.append(
                        {
                            "core": core,
                            "kernel": name,
                            "instructions": len(code),
                            instruction: len(dots),
                            "cycles": round(cycles, 2),
                            "bound": bound,
                            "throughput_percent": round(100 * least / cycles),
                            "share_percent": round(100 * bound / cycles),
                            "tile_percent": round(100 * bound / least),
                        }
                    )
    version = subprocess.run([_llvm_mca(), "--version"], capture_output=True, text=True, check=True).stdout
    RESULTS.write_text(json.dumps({"llvm": re.search(r"version (\S+)", version)[1], "loops": rows}, indent=1) + "\n")  # type: ignore[index]
    for core in dict.fromkeys(row["core"] for row in rows):
        show(f"inner loops on {core}", [row for row in rows if row["core"] == core], False)


if __name__ == "__main__":
    main()
