"""The whole check of CUDA targets on a machine with a GPU: every kernel and whole models against the ``t3c::``
reference, and latencies beside PyTorch's.

    python -m benchmarks.cuda_prepare --target h100        # on any machine: writes build/cuda
    python3 benchmarks/cuda_check.py build/cuda [--output RESULT.json] [--without-torch-compile]    # on that one

The second needs this file and ``examples/`` of the repository, the folder ``build/cuda``, and Python with numpy,
PyTorch, torchvision and transformers; neither Apache TVM nor this package installed. Where a machine takes a copy of
the repository without ignored files, ``build/cuda`` has to be named.

It fails (exit code 1) where a kernel's result is not the reference's to the bit, or a model's logits are not; sums of
real numbers have a tolerance. Latencies are medians of single calls at batch 1 that end with the GPU idle: ``ms`` with
the input on the GPU, ``session_ms`` of ``Session.run`` from numpy to numpy.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_WARM_UP, _CALLS = 10, 100
_TOLERANCE = 1e-5  # of the greatest value, for results whose name begins with ~

Row = dict[str, Any]


def check_cases(folder: Path) -> list[Row]:
    """A row for each kernel case: the share of values that differ from the reference, and by how much."""
    import numpy as np

    from t3c_compile.virtual_machine import VirtualMachine

    machine = VirtualMachine((folder / "cases.so").absolute(), {}, on_gpu=True)
    tensors: list[Any] = []
    with np.load(folder / "packs.npz") as packs:
        for function in dict.fromkeys(name.partition("/")[0] for name in packs.files):
            raw = [packs[name] for name in packs.files if name.partition("/")[0] == function]
            tensors += machine[function](*map(machine.tensor, raw))
    with np.load(folder / "inputs.npz") as inputs:
        arguments = [machine.tensor(inputs[name]) for name in inputs.files]
    found = machine.array(machine["main"](*arguments, machine.tuple(tensors)))
    rows = []
    with np.load(folder / "expected.npz") as expected:
        for name, result in zip(expected.files, found, strict=True):
            reference = expected[name]
            rows.append({"case": name, **difference(result, reference, _TOLERANCE if name.startswith("~") else 0.0)})
    return rows


def difference(result: Any, reference: Any, tolerance: float) -> Row:
    """How far ``result`` is off; ``ok`` where no value is by more than ``tolerance`` of the greatest."""
    import numpy as np

    off = np.abs(result.astype(np.float64) - reference)
    most = float(np.abs(reference).max())
    differ = float(np.mean(~((off == 0) | (np.isnan(result) & np.isnan(reference)))))
    return {"differ": differ, "most": float(np.nanmax(off)), "ok": bool(np.nanmax(off) <= tolerance * most)}


def check_model(folder: Path, synchronize: Callable[[], None]) -> list[Row]:
    """One artifact: its logits against the reference's, and how long a call takes; with CUDA graphs, too."""
    import numpy as np

    import t3c_compile

    with np.load(folder / "case.npz") as case:
        inputs = [case[name] for name in case.files if name != "expected"]
        expected = case["expected"]
    began = time.perf_counter()
    session = t3c_compile.load(folder / "model.t3c")
    loaded = time.perf_counter() - began
    row: Row = {"model": folder.name, "engine": f"t3c {session.target}", "load_s": loaded}
    row |= difference(session.run(*inputs), expected, 0.0)
    row["session_ms"] = milliseconds(lambda: session.run(*inputs), lambda: None)
    # The function itself, on tensors that are there already.
    machine, function, weights = session._machine, session._functions[-1], session._weights
    tensors = [machine.tensor(x) for x in inputs]
    row["ms"] = milliseconds(lambda: function(*tensors, weights), synchronize)
    return [row, check_graphs(folder, inputs, expected, synchronize)]


def check_graphs(folder: Path, inputs: list[Any], expected: Any, synchronize: Callable[[], None]) -> Row:
    """The same with CUDA graphs, which must give the same when they are captured and when they run."""
    from t3c_compile.store import read_store
    from t3c_compile.virtual_machine import VirtualMachine

    machine = VirtualMachine((folder / "graphs.so").absolute(), {}, on_gpu=True)
    with (folder / "model.t3c/weights.safetensors").open("rb") as file:
        store = read_store(file)
    packed: list[Any] = []
    for function, names in json.loads((folder / "graphs.json").read_text()).items():
        packed += machine[function](*(machine.tensor(store[name]) for name in names))
    weights, tensors = machine.tuple(packed), [machine.tensor(x) for x in inputs]

    def call() -> Any:
        return machine["profile_0"](*tensors, weights)

    calls = [difference(machine.array(call()), expected, 0.0) for _ in range(3)]
    worst = max(calls, key=lambda found: found["most"])
    return {"model": folder.name, "engine": "t3c with CUDA graphs", **worst, "ms": milliseconds(call, synchronize)}


def milliseconds(call: Callable[[], Any], synchronize: Callable[[], None]) -> float:
    """Median time of a call, to the end of what it started."""
    times = []
    for _ in range(_WARM_UP + _CALLS):
        synchronize()
        began = time.perf_counter()
        call()
        synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    return median(times[_WARM_UP:])


def torch_rows(name: str, inputs: list[Any], compiled: bool) -> list[Row]:
    """PyTorch's latencies of the same model: eager in float32 and float16, and compiled in float16."""
    import torch

    from examples.models import language, vision

    torch.manual_seed(0)
    model = {**vision.MODELS, **language.MODELS}[name].build(False).eval().cuda()
    tensors = [torch.from_numpy(x).cuda() for x in inputs]
    rows = []
    for engine in ("eager float32", "eager float16", *(["max-autotune float16"] if compiled else [])):
        if engine.endswith("16"):
            model = model.half()
            tensors = [x.half() if x.is_floating_point() else x for x in tensors]
        call = torch.compile(model, mode="max-autotune") if engine.startswith("max") else model
        with torch.inference_mode():
            ms = milliseconds(lambda call=call, tensors=tensors: call(*tensors), torch.cuda.synchronize)  # type: ignore[misc]
        rows.append({"model": name, "engine": f"torch {engine}", "ms": ms})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what benchmarks.cuda_prepare wrote")
    parser.add_argument("--output", type=Path, default=Path("cuda_check.json"))
    parser.add_argument("--without-torch-compile", action="store_true")
    chosen = parser.parse_args()
    wanted = [chosen.folder / name for name in ("runtime/t3c_compile", "runtime/tvm/lib", "cases/cases.so")]
    missing = [str(path) for path in wanted if not path.exists()]
    if missing:
        parser.error(
            f"{', '.join(missing)} is not there: run python -m benchmarks.cuda_prepare, and carry all it wrote"
        )
    sys.path[:0] = [str(chosen.folder / "runtime"), str(ROOT)]
    import numpy as np
    import torch

    if not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here")
    device = torch.cuda.get_device_properties(0)
    result: dict[str, Any] = {
        "gpu": device.name,
        "capability": f"{device.major}.{device.minor}",
        "torch": torch.__version__,
        "cases": check_cases(chosen.folder / "cases"),
        "models": [],
    }

    def save() -> None:
        chosen.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    save()
    for row in result["cases"]:
        print(f"{'ok   ' if row['ok'] else 'WRONG'} {row['case']:20} {row['differ']:8.2%} differ, by {row['most']:g}")
    for folder in sorted(path.parent for path in chosen.folder.glob("*/case.npz")):
        rows = check_model(folder, torch.cuda.synchronize)
        with np.load(folder / "case.npz") as case:
            inputs = [case[name] for name in case.files if name != "expected"]
        rows += torch_rows(folder.name.partition("-")[0], inputs, not chosen.without_torch_compile)
        result["models"] += rows
        save()
        for row in rows:
            print(
                "  ".join(
                    f"{key} {value:.4g}" if isinstance(value, float) else f"{value}" for key, value in row.items()
                )
            )
    sys.exit(0 if all(row.get("ok", True) for row in result["cases"] + result["models"]) else 1)


if __name__ == "__main__":
    main()
