"""What `inspect` and `targets` print: tables, or JSON."""

from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from t3c_compile.backends.targets import get_target, list_targets
from t3c_compile.manifest import check_files, read_manifest
from t3c_compile.show import show, summarize_options


def inspect_artifact(path: str, as_json: bool) -> None:
    """The profiles of an artifact, every file of it checked, or of an exported folder."""
    if any(Path(path).glob("*.onnx")):
        from t3c_compile.backends.onnx import read_profiles

        show_files(path, read_profiles(path), as_json)
        return
    from t3c_compile.drift import METRICS

    manifest = read_manifest(Path(path))
    check_files(Path(path), manifest)
    certificates = {name: entry["conformal"] for name, entry in manifest["targets"].items() if "conformal" in entry}
    rows = []
    for target, entry in manifest["targets"].items():
        for index, (profile, cost) in enumerate(zip(manifest["profiles"], entry["costs"], strict=True)):
            conformal: dict[str, Any] = {}
            if certificates:
                bounds = certificates[target]["profiles"][index] if target in certificates else {"drift": {}}
                conformal = {f"{metric}_bound": bounds["drift"].get(metric) for metric in METRICS}
                conformal["agreement_bound"] = bounds.get("agreement")
            row = {"target": target, "profile": profile["name"], **summarize_options(profile["options"])}
            row |= {"size_kb": profile["size_bytes"] / 1e3, "latency_ms": cost["latency_ms"]}
            row |= {"latency_source": cost["source"].partition(":")[0].partition(" ")[0]}
            row |= {
                "energy_mj": cost["energy_mj"],
                "energy_source": str(cost.get("energy_source", "")).partition(":")[0],
            }
            row |= {"accuracy": profile["quality"].get("accuracy"), "kl": profile["quality"]["kl"]}
            rows.append(row | {"certificate": profile["certificate"]["bound"]} | conformal)
    show(f"{path}: accuracy and KL on calibration data", rows, as_json)
    if as_json:
        return
    for target, certificate in certificates.items():
        print(f"{target}: {certificate['statement']}")
    for target, entry in manifest["targets"].items():
        if "npu" in entry:
            _show_npu(target, entry)


def _show_npu(target: str, entry: Mapping[str, Any]) -> None:
    """What an NPU runs of every profile, and what its host does, and why."""
    rows = []
    for index, (profile, cost) in enumerate(zip(entry["npu"]["profiles"], entry["costs"], strict=True)):
        row = {"profile": f"p{index}", "partitions": len(profile["partitions"]), "macs": profile["macs"]}
        row |= {"on_npu": f"{100 * profile['npu_macs'] / profile['macs']:.1f}%", "cycles": cost["cycles"]}
        row |= {f"{memory}_kb": size / 1e3 for memory, size in cost["peak_bytes"].items()}
        rows.append(row | {f"{memory}_moved_kb": size / 1e3 for memory, size in cost["traffic_bytes"].items()})
    show(f"{target}: {entry['costs'][0]['source']}", rows, False)
    for index, (low, high) in enumerate(pairwise(entry["costs"])):
        if low["cycles"] >= high["cycles"]:
            print(f"{target}: p{index} takes no fewer cycles than p{index + 1}, which is closer to the full model")
    greatest = entry["npu"]["profiles"][-1]
    fallbacks = Counter((f["op"], f["reason"]) for f in greatest["fallbacks"])
    if fallbacks:
        reasons = [{"op": op, "times": count, "reason": why} for (op, why), count in fallbacks.items()]
        show(f"{target}: on the host in the greatest profile", reasons, False)


def show_files(folder: str, profiles: dict[str, dict[str, Any]], as_json: bool) -> None:
    """A table of exported files by name; each has its profile as ``Profile.to_json`` gives it."""
    rows = []
    for file, profile in profiles.items():
        row = {"file": file, **summarize_options(profile["options"]), "size_kb": profile["size_bytes"] / 1e3}
        row |= {"accuracy": profile["quality"].get("accuracy"), "kl": profile["quality"]["kl"]}
        rows.append(row | {"certificate": profile["certificate"]["bound"]})
    show(f"{folder}: accuracy and KL on calibration data", rows, as_json)


def show_targets(as_json: bool) -> None:
    """What is known of each target."""
    rows = []
    for name in list_targets():
        target = get_target(name)
        rows.append(
            {"target": name, "kind": target.kind, "kernels": target.simd or None}
            | {"host": target.host.name if target.host else None, "rank_multiple": target.rank_multiple}
            | {"bits": " ".join(map(str, target.bits)), "accumulate": target.accumulate}
            | {"memory_gb": target.memory_bytes / 1e9, "peak_gops": target.peak_gops}
            | {"peak_gflops": target.peak_gflops, "bandwidth_gbps": target.bandwidth_gbps}
            | {"cost": target.cost, "roofline": target.roofline, "features": " ".join(target.features)}
        )
    show("targets", rows, as_json)
