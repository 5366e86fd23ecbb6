"""One row of the table of ``benchmarks/models.py``: one JSON line a cell on standard output.

Errors are relative: the 2-norm of the difference of all outputs, divided by the 2-norm of the reference.
"""

import argparse
import json
import re
import sys
import time
import traceback
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import t3c_compile as t3c  # noqa: E402
from t3c_compile import qemu  # noqa: E402
from t3c_compile.artifact import export_profiles  # noqa: E402
from t3c_compile.backends.targets import get_target  # noqa: E402
from t3c_compile.passes.capture import capture  # noqa: E402
from t3c_compile.passes.elastic import elastic_layers, full_width_known  # noqa: E402
from t3c_compile.passes.errors import T3CError  # noqa: E402
from t3c_compile.passes.path_gains import first_tensor  # noqa: E402
from t3c_compile.passes.specialize import specialize  # noqa: E402

WORK = REPO / "build" / "models"
PROFILES = 3
_ON_ARM64 = """
import sys, numpy, t3c_compile as t3c
session = t3c.load(sys.argv[1])
inputs = numpy.load(sys.argv[2])
assert session.target == "arm64"
numpy.save(sys.argv[3], session.run(*(inputs[name] for name in inputs.files)))
"""


def relative(found: Tensor, reference: Tensor) -> float:
    """2-norm of the difference over that of the reference."""
    return float((found.double() - reference.double()).norm() / reference.double().norm())


class Row:
    """One model; what a cell needs of the ones before is made once, and kept on disk from ``snap`` on."""

    def __init__(self, name: str, small: bool) -> None:
        self.name, self.small = name, small
        self.builder = _builders()[name]
        self.inputs, self.others = self.builder.inputs(small), self.builder.other_inputs(small)
        self.folder = WORK / (name + ("-small" if small else ""))
        self.folder.mkdir(parents=True, exist_ok=True)

    # -- what cells share -----------------------------------------------------------------------------------------

    @cached_property
    def model(self) -> nn.Module:
        return self.builder.build(self.small)

    @cached_property
    def elastic(self) -> Any:
        return t3c.transform(self.model, self.inputs, dynamic_shapes=self.builder.dynamic_shapes(self.small))

    @cached_property
    def snapped(self) -> tuple[Any, Any]:
        """The elastic model and its profiles."""
        kept = self.folder / "snapped.pt"
        if kept.exists():
            found: tuple[Any, Any] = torch.load(kept, weights_only=False)
            return found
        targets = [get_target("x86_64"), get_target("arm64")]
        profiles = t3c.snap(self.elastic, [self.inputs, self.others], targets, count=PROFILES)
        torch.save((self.elastic, profiles), kept)
        return self.elastic, profiles

    def specialized(self, index: int) -> torch.fx.GraphModule:
        elastic, profiles = self.snapped
        profile = profiles.profiles[index]
        return specialize(elastic, profile.options, profile.activations, profiles.store_ranks())

    @torch.no_grad()
    def reference(self, index: int, inputs: tuple[Tensor, ...]) -> Tensor:
        return first_tensor(self.specialized(index)(*inputs))

    def artifact(self, target: str) -> Path:
        path = self.folder / f"{target}.t3c"
        if not path.exists():
            elastic, profiles = self.snapped
            t3c.lower(elastic, profiles, [target], path, self.inputs)
        return path

    # -- cells ------------------------------------------------------------------------------------------------------

    def capture(self) -> str:
        captured = capture(self.model, self.inputs, self.builder.dynamic_shapes(self.small)).eval()
        return f"{self._against_model(captured):.1e}"

    def transform(self) -> str:
        report = self.elastic.report
        kept = f", {len(report.kept)} kept" if report.kept else ""
        return f"{self._against_model(self.elastic.eval()):.1e}; {len(report.elastic)} layers{kept}"

    @torch.no_grad()
    def _against_model(self, graph: nn.Module) -> float:
        return relative(first_tensor(graph(*self.inputs)), first_tensor(self.model(*self.inputs)))

    def train_step(self) -> str:
        """One step of gradient descent, of a size that should lower the loss by 1%; later cells go on from there."""
        elastic = self.elastic.train()
        # Only capture and transform are compared with the model; a large one is not kept beside its factors.
        self.__dict__.pop("model", None)
        with full_width_known(elastic):
            loss = self._loss()
            loss.backward()
        layers = dict(elastic_layers(elastic))
        still = [name for name, layer in layers.items() if not _learns(layer)]
        if still:
            raise AssertionError(f"no finite gradient other than zero in {len(still)} layers: {', '.join(still[:3])}")
        parameters = [p for p in elastic.parameters() if p.grad is not None]
        square = sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None)
        optimizer = torch.optim.SGD(parameters, lr=0.01 * float(loss) / square)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            after = float(self._loss())
        elastic.eval()
        return f"loss {float(loss):.4f} to {after:.4f}, all {len(layers)} layers"

    def _loss(self) -> Tensor:
        # The same dropout in both.
        torch.manual_seed(0)
        loss: Tensor = self.builder.loss(self.elastic(*self.others))
        return loss

    def snap(self) -> str:
        (self.folder / "snapped.pt").unlink(missing_ok=True)
        _, profiles = self.snapped
        return f"{len(profiles.profiles)} profiles, " + " / ".join(
            f"{profile.size_bytes / 1e6:.3g}" for profile in profiles.profiles
        )

    @torch.no_grad()
    def specialize(self) -> str:
        """Every profile exported again, against the elastic graph at its options."""
        elastic, profiles = self.snapped
        programs, _ = export_profiles(elastic, profiles, self.inputs)
        layers = dict(elastic_layers(elastic.eval()))
        errors = []
        for profile, program in zip(profiles.profiles, programs.values(), strict=True):
            elastic.set_options(profile.options)
            for name, layer in layers.items():
                layer.set_activations(profile.activations[name])
            exported = first_tensor(program.module(check_guards=False)(*self.inputs))
            errors.append(relative(exported, first_tensor(elastic(*self.inputs))))
        elastic.set_full()
        return f"{max(errors):.1e}"

    def x86_64(self) -> str:
        self._forget("x86_64")
        session = t3c.load(self.artifact("x86_64"))
        errors = [self._run(session, index, self.inputs) for index in range(len(session.profiles))]
        times = " / ".join(f"{profile.latency_ms:.3g}" for profile in session.profiles)
        return f"{max(errors):.1e}; {times} ms"

    def _run(self, session: Any, index: int, inputs: tuple[Tensor, ...]) -> float:
        session.set_profile(session.profiles[index].name)
        found = session.run(*(x.numpy() for x in inputs))
        return relative(
            torch.from_numpy(found[0] if isinstance(found, tuple) else found), self.reference(index, inputs)
        )

    def arm64(self) -> str:
        """The greatest profile, under QEMU."""
        if reason := qemu.unavailable():
            raise T3CError(reason)
        self._forget("arm64")
        artifact = self.artifact("arm64")
        given, answer = self.folder / "inputs.npz", self.folder / "outputs.npy"
        np.savez(given, *(x.numpy() for x in self.inputs))
        done = qemu.run_python(["-c", _ON_ARM64, str(artifact), str(given), str(answer)], timeout=3000)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        found = torch.from_numpy(np.load(answer))
        return f"{relative(found, self.reference(-1, self.inputs)):.1e}"

    def _forget(self, target: str) -> None:
        import shutil

        shutil.rmtree(self.folder / f"{target}.t3c", ignore_errors=True)

    def dynamic_shapes(self) -> str:
        """The compiled model on inputs of another size."""
        elastic, _ = self.snapped
        if not elastic.meta["t3c_batch_is_free"]:
            raise T3CError("; ".join(elastic.report.notes))
        session = t3c.load(self.artifact("x86_64"))
        worst = max(self._run(session, index, self.others) for index in (0, len(session.profiles) - 1))
        return f"{worst:.1e}; {' and '.join(str(list(x.shape)) for x in self.others[:1])}"

    def onnx(self) -> str:
        """The greatest profile in ONNX Runtime."""
        import onnxruntime

        from t3c_compile.backends.onnx import export_onnx

        elastic, profiles = self.snapped
        path = export_onnx(elastic, profiles.profiles[-1:], self.folder / "onnx", self.inputs)
        (file,) = path.glob("*.onnx")
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        names = [entry.name for entry in session.get_inputs()]
        found = session.run(None, dict(zip(names, (x.numpy() for x in self.inputs), strict=True)))[0]
        return f"{relative(torch.from_numpy(found), self.reference(-1, self.inputs)):.1e}"

    def mlir(self, dialect: str) -> str:
        """The greatest profile as a verified module."""
        from t3c_compile.backends.mlir import to_mlir

        elastic, profiles = self.snapped
        to_mlir(elastic, profiles.profiles[-1], self.inputs, dialect)
        return "verifies"

    def cell(self, column: str) -> Callable[[], str]:
        named: dict[str, Callable[[], str]] = {
            "capture": self.capture,
            "transform": self.transform,
            "train step": self.train_step,
            "snap": self.snap,
            "specialize": self.specialize,
            "x86_64": self.x86_64,
            "arm64": self.arm64,
            "dynamic shapes": self.dynamic_shapes,
            "ONNX": self.onnx,
        }
        return named.get(column) or (lambda: self.mlir(column))


def _learns(layer: nn.Module) -> bool:
    grads = [p.grad for p in layer.parameters()]
    return all(g is not None and bool(g.isfinite().all()) for g in grads) and any(
        bool(g.any()) for g in grads if g is not None
    )


def _builders() -> dict[str, Any]:
    from examples.models import language, vision

    return {**vision.MODELS, **language.MODELS}


def _reason(error: BaseException) -> str:
    """What the tool tells its user; for an error that is not the tool's own, its kind too."""
    # Where packages are installed is this machine's own.
    text = re.sub(r"/\S*/site-packages/", "", " ".join(str(error).split()))
    return text if isinstance(error, T3CError) else f"{type(error).__name__}: {text}"


def _peak_mb(reset: bool = False) -> int:
    """Greatest resident memory since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("columns")
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    row = Row(arguments.model, arguments.small)
    for column in arguments.columns.split(","):
        cell: dict[str, Any] = {"model": row.name, "column": column, "small": row.small}
        _peak_mb(reset=True)
        start = time.perf_counter()
        try:
            cell["result"] = row.cell(column)()
        except Exception as error:
            traceback.print_exc()
            cell["reason"] = _reason(error)
        cell |= {"seconds": round(time.perf_counter() - start, 1), "peak_mb": _peak_mb()}
        print(json.dumps(cell), flush=True)


if __name__ == "__main__":
    main()
