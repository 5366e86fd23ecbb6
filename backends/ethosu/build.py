"""Every profile for Ethos-U targets: the host's library, the partitions as TOSA, and their command streams."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from t3c_compile.backends.ethosu.host import export_host, split_profile
from t3c_compile.backends.ethosu.partition import Split
from t3c_compile.backends.ethosu.program import Program
from t3c_compile.backends.ethosu.vela import Estimate, clock_hz, compile_partition, tool
from t3c_compile.backends.targets import Target, get_target, host_target, machine
from t3c_compile.backends.tvm.build import Library, build_library
from t3c_compile.passes.errors import T3CError


class NpuError(T3CError):
    """No layer of a profile can run on an NPU."""


@dataclass(frozen=True)
class NpuProfiles:
    """The profiles of one model, split. What an NPU runs of them is the same for every Ethos-U.

    ``exact``: results are those of the ``t3c::`` ops to the bit.
    """

    splits: list[Split]
    inputs: tuple[Tensor, ...]
    exact: bool = False

    @staticmethod
    def of(graphs: Sequence[GraphModule], inputs: tuple[Tensor, ...], exact: bool = False) -> "NpuProfiles":
        """``graphs``: specialized profiles, which are used up; ``inputs``: of batch 1; ``exact`` as it is kept.

        Raises:
            NpuError: the NPU can run nothing of a profile.
        """
        splits = [split_profile(graph, inputs, exact) for graph in graphs]
        for split in splits:
            if not split.programs:
                reasons = sorted({f"{f.op} ({f.reason})" for f in split.fallbacks if f.macs})
                raise NpuError(
                    f"an Ethos-U can run nothing of this model: {', '.join(reasons)}; snap it with int8 activations "
                    "and at most 8 bits, or lower it for a CPU"
                )
        return NpuProfiles(splits, inputs, exact)

    def store(self) -> dict[str, Tensor]:
        """What the host's part reads."""
        return {name: tensor.detach() for split in self.splits for name, tensor in split.host.state_dict().items()}

    def programs(self) -> dict[str, Program]:
        return {name: program for split in self.splits for name, program in split.programs.items()}

    def write_partitions(self, folder: Path) -> dict[str, str]:
        """The flatbuffers as ``folder/NAME.tosa``; the files' names by partition."""
        folder.mkdir(exist_ok=True)
        names = {}
        for name, flatbuffer in self._flatbuffers().items():
            (folder / f"{name}.tosa").write_bytes(flatbuffer)
            names[name] = f"{folder.name}/{name}.tosa"
        return names

    def build_hosts(self, folder: Path) -> list[tuple[Library, Target]]:
        """Libraries of the host's part in ``folder``: for arm64, and for this machine where it is another."""
        exported = {f"profile_{index}": export_host(split, self.inputs) for index, split in enumerate(self.splits)}
        hosts = {machine(target): target for target in (get_target("arm64"), host_target())}
        return [
            (build_library(exported, target, folder / f"ethos-u-host-{name}.so"), target)
            for name, target in hosts.items()
        ]

    def costs(self, target: Target) -> list[dict[str, Any]]:
        """vela's estimate of every profile.

        Raises:
            VelaError: as :meth:`compile`.
        """
        parts = {name: compile_partition(blob, target)[1] for name, blob in self._flatbuffers().items()}
        return [_cost([parts[name] for name in split.programs], target) for split in self.splits]

    def _flatbuffers(self) -> dict[str, bytes]:
        return {name: blob for split in self.splits for name, blob in split.flatbuffers.items()}

    def compile(self, target: Target, folder: Path, tosa: Mapping[str, str]) -> dict[str, Any]:
        """The command streams of all profiles in ``folder``, and what the manifest's target says of its NPU.

        Raises:
            VelaError: a partition cannot be compiled, or does not fit the target's memory.
        """
        streams, estimates, partitions = {}, {}, {}
        for name, flatbuffer in self._flatbuffers().items():
            streams[name], estimates[name] = compile_partition(flatbuffer, target)
        for name, program in self.programs().items():
            file = folder / f"{name}.{target.name}.tflite"
            file.write_bytes(streams[name])
            partitions[name] = {
                "tosa": tosa[name],
                "command_stream": f"{folder.name}/{file.name}",
                "inputs": [[list(tensor.shape), tensor.dtype] for tensor in program.inputs],
                "outputs": [[list(tensor.shape), tensor.dtype] for tensor in program.outputs],
                **asdict(estimates[name]),
            }
        return {
            "tool": tool(),
            "exact": self.exact,
            **target.vela,
            "partitions": partitions,
            "profiles": [_described(split) for split in self.splits],
            "costs": [_cost([estimates[name] for name in split.programs], target) for split in self.splits],
        }


def _described(split: Split) -> dict[str, Any]:
    return {
        "partitions": list(split.programs),
        "macs": split.macs,
        "npu_macs": split.npu_macs,
        "fallbacks": [asdict(fallback) for fallback in split.fallbacks],
    }


def _cost(estimates: Sequence[Estimate], target: Target) -> dict[str, Any]:
    """A call's partitions one after the other; what the host does between them is not in it."""
    cycles = sum(estimate.cycles for estimate in estimates)
    memories = sorted({memory for estimate in estimates for memory in estimate.peak})
    return {
        "latency_ms": 1e3 * cycles / clock_hz(target),
        "energy_mj": sum(estimate.energy_mj for estimate in estimates),
        "source": f"{tool()} estimate of the NPU's part, {target.vela['system_config']}, {target.vela['memory_mode']}",
        "cycles": cycles,
        "peak_bytes": {m: max(e.peak.get(m, 0) for e in estimates) for m in memories},
        "traffic_bytes": {m: sum(e.traffic.get(m, 0) for e in estimates) for m in memories},
    }
