"""vela compiles a TOSA flatbuffer for one Ethos-U and estimates what a call takes.

By vela's compiler core, ``ethosu.regor``, as its command ``vela --system-config ... --memory-mode ... model.tosa``
calls it. vela has no simulator: the command stream itself runs on a device alone.
"""

from configparser import ConfigParser
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from importlib.resources.abc import Traversable

from t3c_compile.backends.targets import Target
from t3c_compile.passes.errors import T3CError

# As vela's own command line has them.
_OPTIONS = """
[compiler]
output_format=TFLite
cop_format=COP1
[scheduler]
optimize=Performance
arena_size_limit={arena}
disable_feature=
cpu_tensor_alignment=16
tensor_allocator=HillClimb
[graph]
"""

# Energy in picojoules: M. Horowitz, "Computing's energy problem", ISSCC 2014, figure 1.1.9: 8-bit multiply 0.2 and add
# 0.03; 64 bits from a 1 MB SRAM 100; 64 bits from DRAM 1.3 to 2.6 nJ, the lower taken. It has no figure for flash:
# DRAM's is taken.
_PJ_PER_MAC = 0.23
_PJ_PER_SRAM_BYTE = 12.5
_PJ_PER_DRAM_BYTE = 162.5


class VelaError(T3CError):
    """vela cannot compile a partition, or the target's memory cannot hold it."""


@dataclass(frozen=True)
class Estimate:
    """vela's static estimate of one call.

    ``cycles`` of the NPU, its memories' stalls included. ``peak`` and ``traffic``: by memory (``Sram``, ``Dram``,
    ``OffChipFlash``), the most bytes in use and the bytes read and written. ``macs``: as vela counts them.
    """

    cycles: int
    macs: int
    peak: dict[str, int]
    traffic: dict[str, int]

    @property
    def energy_mj(self) -> float:
        """By the constants above."""
        bytes_pj = {"Sram": _PJ_PER_SRAM_BYTE}
        moved = sum(size * bytes_pj.get(memory, _PJ_PER_DRAM_BYTE) for memory, size in self.traffic.items())
        return (self.macs * _PJ_PER_MAC + moved) * 1e-9


def tool() -> str:
    """What compiles and estimates, with its version."""
    return f"ethos-u-vela {version('ethos-u-vela')}"


def compile_partition(flatbuffer: bytes, target: Target) -> tuple[bytes, Estimate]:
    """The command stream with its weights (a TFLite file with one ``ethos-u`` operator) and the estimate.

    Raises:
        VelaError: vela refuses the partition, would leave a part of it to a CPU, or it needs more memory than there is.
    """
    from ethosu import regor

    architecture, macs, cores = _accelerator(target)
    system, memory = target.vela["system_config"], target.vela["memory_mode"]
    arena = _vela_ini()[f"Memory_Mode.{memory}"].getint("arena_cache_size", fallback=1 << 40)
    described = (
        f"[architecture]\nmacs={macs // cores}\ncores={cores}\n"
        f"[vela]\nsystem_config_name={system}\nmemory_mode_name={memory}\n{_ini_file().read_text(encoding='utf-8')}"
    )
    try:
        model = regor.compile(architecture, flatbuffer, "TOSA", described, _OPTIONS.format(arena=arena), False)
    except RuntimeError as error:
        raise VelaError(f"target {target.name}: vela cannot compile a partition: {error}") from error
    report = model.perf_report
    if report.cpuOps:
        raise VelaError(f"target {target.name}: vela leaves {report.cpuOps} operators of a partition to a CPU")
    # The others are tables within the NPU.
    memories = {name: found for name, found in report.memories.items() if name in ("Sram", "Dram", "OffChipFlash")}
    peak = {name: int(found.peakUsage) for name, found in memories.items()}
    if sum(peak.values()) > target.memory_bytes:
        used = ", ".join(f"{size} of {name}" for name, size in peak.items())
        raise VelaError(
            f"target {target.name}: a partition needs {sum(peak.values())} bytes of memory ({used}), there are "
            f"{target.memory_bytes}: take a smaller profile or input, or a target with more memory"
        )
    traffic = {
        name: sum(int(a.bytesRead) + int(a.bytesWritten) for a in found.accesses.values())
        for name, found in memories.items()
    }
    return bytes(model.model), Estimate(int(report.totalCycles), int(report.macCount), peak, traffic)


def clock_hz(target: Target) -> float:
    """The NPU's clock in vela's system configuration."""
    return float(_vela_ini()[f"System_Config.{target.vela['system_config']}"]["core_clock"])


def _accelerator(target: Target) -> tuple[str, int, int]:
    """vela's architecture, multiply-adds a cycle on all cores, and cores."""
    _, series, macs = target.vela["accelerator"].split("-")
    # As vela has it: the U65 of 512 is two cores.
    return f"Ethos{series.upper()}", int(macs), 2 if target.vela["accelerator"] == "ethos-u65-512" else 1


def _ini_file() -> Traversable:
    return files("ethosu") / "config_files" / "Arm" / "vela.ini"


@cache
def _vela_ini() -> ConfigParser:
    ini = ConfigParser()
    ini.read_string(_ini_file().read_text(encoding="utf-8"))
    return ini
