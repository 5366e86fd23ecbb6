"""Everything that ``benchmarks/cuda_check.py`` needs on a machine with a GPU and PyTorch, but without Apache TVM.

    python -m benchmarks.cuda_prepare --target h100 [--models resnet50:0.5 vit_b_16:0.5] [--python 3.12] [-o build/cuda]

No GPU is needed here. Into the folder go ``runtime/`` (this package, TVM's runtime libraries and its FFI for that
machine's Python, from PyPI), ``cases/`` (a library with every kernel, its inputs, and what the ``t3c::`` reference
gives) and a folder for each model: its artifact, one input, and the reference's logits. A model is a name of
``examples/models`` and the share of its multiply-adds to keep, 1 for dense. Their weights are random.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
# What a carried folder may hold, as a warning.
_MOST = 64 << 20


def collect_runtime(folder: Path, python: str) -> None:
    """``folder`` to put on ``PYTHONPATH``: what loading and running an artifact imports."""
    import tvm

    import t3c_compile

    libraries = Path(tvm.__file__).parent / "lib"
    (folder / "tvm/lib").mkdir(parents=True)
    (folder / "tvm/__init__.py").write_text('"""TVM\'s runtime libraries alone."""\n')
    for name in ("libtvm_runtime.so", "libtvm_runtime_cuda.so"):
        shutil.copy(libraries / name, folder / "tvm/lib")
    ignore = shutil.ignore_patterns("__pycache__", "*.jsonl")
    shutil.copytree(Path(t3c_compile.__file__).parent, folder / "t3c_compile", ignore=ignore)
    for name in ("passes", "backends"):
        if not (folder / "t3c_compile" / name).exists():
            shutil.copytree(ROOT / name, folder / "t3c_compile" / name, ignore=ignore)
    with tempfile.TemporaryDirectory() as downloads:
        from importlib.metadata import version

        package = f"apache-tvm-ffi=={version('apache-tvm-ffi')}"
        options = ["--no-deps", "--only-binary=:all:", "--python-version", python, "--quiet", "-d", downloads]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, package], check=True)
        for wheel in Path(downloads).iterdir():
            shutil.unpack_archive(wheel, folder, "zip")


def prepare_cases(target: str, folder: Path) -> None:
    """Every kernel in one library."""
    sys.path.insert(0, str(ROOT / "tests"))
    from cuda_cases import CudaCases

    from t3c_compile.backends.targets import get_target
    from t3c_compile.backends.tvm.build import build_library

    folder.mkdir()
    model = CudaCases().eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.manual_seed(0)
    inputs = torch.randn(3, 9, 36), torch.randn(3, 16, 9, 7)
    program = torch.export.export(model, inputs, dynamic_shapes=({0: batch}, {0: batch}), strict=False)
    library = build_library({"main": program}, get_target(target), folder / "cases.so")
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    np.savez(
        folder / "packs.npz", **{f"{f}/{i}": state[n] for f, ns in library.packs.items() for i, n in enumerate(ns)}
    )
    with torch.no_grad():
        expected = model(*inputs)
    np.savez(folder / "inputs.npz", *[x.numpy() for x in inputs])
    np.savez(folder / "expected.npz", **{name: value.numpy() for name, value in expected.items()})


def prepare_model(name: str, fraction: float, target: str, folder: Path) -> None:
    """The artifact of one profile for ``target`` alone, for batch 1, an input and the reference's logits; the same
    library with CUDA graphs."""
    from benchmarks.engines import builder, inputs_of, one_profile
    from t3c_compile.artifact import export_profiles, lower
    from t3c_compile.backends.targets import get_target
    from t3c_compile.backends.tvm.build import build_library
    from t3c_compile.passes.specialize import specialize

    folder.mkdir()
    torch.manual_seed(0)
    batches = inputs_of(name, 1, 4)
    elastic, profiles = one_profile(builder(name).build(False).eval(), batches, fraction)
    (profile,) = profiles.profiles
    profile.costs[target] = profile.costs["x86_64"]
    elastic.meta |= {"t3c_dynamic_shapes": None, "t3c_batch_is_free": False, "t3c_two_rows": False}
    lower(elastic, profiles, [target], folder / "model.t3c", batches[0], measured=False)
    programs, _ = export_profiles(elastic, profiles, batches[0])
    library = build_library(programs, get_target(target), folder / "graphs.so", cuda_graphs=True)
    packs = {function: list(names) for function, names in library.packs.items()}
    (folder / "graphs.json").write_text(json.dumps(packs))
    graph = specialize(elastic, profile.options, profile.activations, profiles.store_ranks())
    with torch.no_grad():
        expected = graph(*batches[0])
    np.savez(folder / "case.npz", *[x.numpy() for x in batches[0]], expected=expected.numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="h100")
    parser.add_argument("--models", nargs="*", default=["resnet50:0.5", "vit_b_16:0.5"])
    parser.add_argument("--python", default="3.12", help="the version on the machine with the GPU")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "build/cuda")
    chosen = parser.parse_args()
    models = [(name, float(share)) for name, _, share in (model.partition(":") for model in chosen.models)]
    shutil.rmtree(chosen.output, ignore_errors=True)
    chosen.output.mkdir(parents=True)
    collect_runtime(chosen.output / "runtime", chosen.python)
    prepare_cases(chosen.target, chosen.output / "cases")
    for name, share in models:
        prepare_model(name, share, chosen.target, chosen.output / f"{name}-{share:g}")
    size = sum(file.stat().st_size for file in chosen.output.rglob("*") if file.is_file())
    print(f"{chosen.output}: {size / 2**20:.1f} MiB" + (", more than 64 can be carried" if size > _MOST else ""))


if __name__ == "__main__":
    main()
