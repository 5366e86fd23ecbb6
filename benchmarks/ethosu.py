"""What an Ethos-U runs of common models, and vela's estimates: ``python -m benchmarks.ethosu resnet50 --small``.

Profiles are those of a set for all Ethos-U, so cycles rise along it on each. For each profile: the share of
multiply-adds on the NPU, whether the TOSA reference model gives the bits of the ``t3c::`` reference on some inputs, and
for every target cycles, time and energy; then what falls back and why. With ``--exact`` the host does all rounding, and
the bits are those of the whole profile on any other target. Weights are random (shares do not depend on what they are,
and cycles next to nothing), so profiles that come no closer to the full model are kept; attention is in integers.
Results go to ``benchmarks/results/ethosu.json``, in place of those of the same model.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import tosa_reference_model
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter

import t3c_compile as t3c
from examples.digits import models as digits
from examples.models.vision import MODELS, settled
from t3c_compile import snapping
from t3c_compile.backends.ethosu.host import split_profile
from t3c_compile.backends.ethosu.partition import Split
from t3c_compile.backends.ethosu.vela import VelaError, clock_hz, compile_partition
from t3c_compile.backends.targets import get_target, list_targets
from t3c_compile.npu import quiet
from t3c_compile.passes.specialize import specialize
from t3c_compile.show import show

RESULTS = Path(__file__).parent / "results" / "ethosu.json"
NPUS = [target for target in map(get_target, list_targets()) if target.kind == "ethos-u"]
DIGITS = {f"digits_{name}": make for name, make in digits.MODELS.items()}


def model_and_images(name: str, small: bool, count: int) -> tuple[nn.Module, Tensor]:
    """A model with random weights, and ``count`` images for it."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    if name in DIGITS:
        return settled(DIGITS[name](), (1, 8, 8)), torch.randn(count, 1, 8, 8, generator=generator)
    size = MODELS[name].inputs(small)[0].shape[1:]
    return MODELS[name].build(small), torch.randn(count, *size, generator=generator)


class Checked(Interpreter):
    """A host's graph whose partitions the TOSA reference model computes, too; ``equal``: always to the same bits."""

    def __init__(self, split: Split) -> None:
        super().__init__(split.host)
        self.split, self.equal = split, True

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        found = super().call_function(target, args, kwargs)
        if target is torch.ops.t3c.npu.default:
            inputs, name, _ = args
            with quiet():
                given = [x.contiguous().numpy() for x in inputs]
                outputs, _ = tosa_reference_model.run(self.split.flatbuffers[name], given)
            theirs = (torch.from_numpy(out.reshape(mine.shape)) for out, mine in zip(outputs, found, strict=True))
            self.equal &= all(map(torch.equal, found, theirs))
        return found


@torch.no_grad()
def checked(profile: GraphModule, split: Split, images: Tensor, exact: bool) -> bool:
    """Whether TOSA's model and, of an exact NPU, the profile's own reference give the same bits on every image."""
    run = Checked(split)
    results = [run.run(image) for image in images.split(1)]
    same = not exact or all(torch.equal(profile(x), y) for x, y in zip(images.split(1), results, strict=True))
    return run.equal and same


def estimates(split: Split) -> dict[str, Any]:
    """vela's for every target, or why it does not compile."""
    found: dict[str, Any] = {}
    for target in NPUS:
        try:
            parts = [compile_partition(split.flatbuffers[part], target)[1] for part in split.programs]
        except VelaError as error:
            found[target.name] = {"reason": str(error)}
            continue
        cycles = sum(part.cycles for part in parts)
        peak = {m: max(part.peak.get(m, 0) for part in parts) for m in parts[0].peak}
        energy = sum(part.energy_mj for part in parts)
        found[target.name] = {"cycles": cycles, "ms": 1e3 * cycles / clock_hz(target), "mj": energy, "peak_bytes": peak}
    return found


def rows_of(name: str, small: bool, exact: bool, count: int, inputs: int, others: int) -> list[dict[str, Any]]:
    """One row a profile, from least to greatest; ``inputs`` are compared in the greatest, ``others`` in the others."""
    model, images = model_and_images(name, small, max(4, inputs))
    calibration = images[:4]
    elastic = t3c.transform(model, (calibration,), t3c.Config(rank_multiple=16), calibration=[(calibration,)])
    elastic.set_attention_dtype("int8")
    with patch.object(snapping, "drop_dominated", lambda profiles: (profiles, [])):
        found = t3c.snap(elastic, [(calibration,)], NPUS, count=count, progress=True, exact_npu=exact)
    rows = []
    for profile in found.profiles:

        def graph(profile: Any = profile) -> GraphModule:
            return specialize(elastic, profile.options, profile.activations, found.store_ranks())

        split = split_profile(graph(), (images[:1],), exact)
        lost = Counter((f.op, f.reason) for f in split.fallbacks)
        compared = images[: inputs if profile is found.profiles[-1] else others]
        rows.append(
            {
                "model": name,
                "small": small,
                "exact": exact,
                "profile": profile.name,
                "macs": split.macs,
                "on_npu": split.npu_macs / split.macs,
                "partitions": len(split.programs),
                "inputs": len(compared),
                "equal": checked(graph(), split, compared, exact),
                "targets": estimates(split),
                "host": [{"op": op, "times": times, "reason": why} for (op, why), times in lost.items()],
            }
        )
    return rows


def report(rows: list[dict[str, Any]]) -> None:
    """Print what there is to say of one model."""
    way = f"{', small' if rows[0]['small'] else ''}{', exact' if rows[0]['exact'] else ''}"
    table = []
    for row in rows:
        shown = {"profile": row["profile"], "on_npu": f"{100 * row['on_npu']:.2f}%", "macs": row["macs"]}
        shown |= {"partitions": row["partitions"], "equal": f"{row['equal']} on {row['inputs']}"}
        table.append(shown | {t.removeprefix("ethos-"): e.get("cycles", e) for t, e in row["targets"].items()})
    show(f"{rows[0]['model']}{way}: vela's cycles by target", table, False)
    show("on the host in the greatest profile", rows[-1]["host"], False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=[*DIGITS, *MODELS])
    parser.add_argument("--small", action="store_true", help="variants that take seconds")
    parser.add_argument("--exact", action="store_true", help="the host does all rounding")
    parser.add_argument("--profiles", type=int, default=4, help="how many (default 4)")
    parser.add_argument("--inputs", type=int, default=64, help="how many are compared (default 64)")
    parser.add_argument("--others", type=int, help="how many in all but the greatest profile (default: as many)")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for name in chosen.models:
        case = (name, chosen.small, chosen.exact)
        rows = rows_of(*case, chosen.profiles, chosen.inputs, chosen.others or chosen.inputs)
        report(rows)
        kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
        kept = [row for row in kept if (row["model"], row["small"], row["exact"]) != case]
        RESULTS.write_text(json.dumps(kept + rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
