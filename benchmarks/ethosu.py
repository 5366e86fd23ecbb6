"""What an Ethos-U runs of common models, and vela's estimates: ``python -m benchmarks.ethosu resnet50 --small``.

For the least and the greatest of two profiles: the share of multiply-adds on the NPU, what falls back and why, and for
every target cycles, memory and energy. Weights are random; shares and cycles do not depend on what they are.
"""

import argparse
from collections import Counter

import torch

import t3c_compile as t3c
from examples.models.vision import MODELS
from t3c_compile.backends.ethosu.build import NpuProfiles
from t3c_compile.backends.ethosu.vela import VelaError, clock_hz, compile_partition
from t3c_compile.backends.targets import get_target, list_targets
from t3c_compile.npu_artifact import split_profiles
from t3c_compile.show import show

_TARGETS = [name for name in list_targets() if get_target(name).kind == "ethos-u"]


def profiles(name: str, small: bool) -> NpuProfiles:
    """The two profiles of a model, split."""
    builder = MODELS[name]
    model, (images,) = builder.build(small), builder.other_inputs(small)
    elastic = t3c.transform(model, (images,), t3c.Config(rank_multiple=16), calibration=[(images,)], progress=True)
    found = t3c.snap(elastic, [(images,)], [get_target(_TARGETS[0])], count=2, progress=True)
    return split_profiles(elastic, found, (images,))


def report(name: str, small: bool) -> None:
    """Print what there is to say of one model."""
    npu = profiles(name, small)
    rows = []
    for index, split in enumerate(npu.splits):
        share = {"profile": f"p{index}", "on_npu": f"{100 * split.npu_macs / split.macs:.2f}%", "macs": split.macs}
        for target in _TARGETS:
            row = {**share, "partitions": len(split.programs), "target": target}
            described = get_target(target)
            try:
                found = [compile_partition(blob, described)[1] for blob in split.flatbuffers.values()]
            except VelaError as error:
                rows.append(row | {"cycles": None, "ms": None, "mj": None, "peak": str(error)})
                continue
            cycles = sum(estimate.cycles for estimate in found)
            peak = {m: max(e.peak.get(m, 0) for e in found) // 1024 for m in found[0].peak}
            row |= {"cycles": cycles, "ms": 1e3 * cycles / clock_hz(described), "mj": sum(e.energy_mj for e in found)}
            rows.append(row | {"peak": " ".join(f"{m} {size} KiB" for m, size in peak.items())})
    show(f"{name}{', small' if small else ''}", rows, False)
    lost = Counter((f.op, f.reason) for f in npu.splits[-1].fallbacks)
    reasons = [{"op": op, "times": count, "reason": why} for (op, why), count in lost.items()]
    show("on the host in the greatest profile", reasons, False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", choices=list(MODELS))
    parser.add_argument("--small", action="store_true", help="variants that take seconds")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.models:
        report(name, arguments.small)


if __name__ == "__main__":
    main()
