"""``lower``: an elastic model and its profiles become one artifact, written whole or not at all."""

import errno
import os
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph

from t3c_compile.backends.targets import Target, get_target
from t3c_compile.backends.tvm.cuda.nvrtc import require_compiler
from t3c_compile.cost import dense_int8_bytes
from t3c_compile.manifest import MANIFEST, SCHEMA, STORE, ArtifactError, Manifest, described, write_manifest
from t3c_compile.measuring import CALLS, measure
from t3c_compile.memory import activation_bytes, require_fit
from t3c_compile.npu_artifact import described_library, lower_npu_targets, npu_inputs, split_profiles
from t3c_compile.passes.capture import traced_inputs
from t3c_compile.passes.errors import T3CError
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.renumber import differ_in_numbers_alone, renumbered
from t3c_compile.passes.specialize import specialize
from t3c_compile.profile import ProfileSet
from t3c_compile.progress import progress_bar
from t3c_compile.runtime import refusal
from t3c_compile.signing import Key, private_key, sign
from t3c_compile.store import write_store

if TYPE_CHECKING:
    from t3c_compile.backends.tvm.assemble import TensorInfo

_TOOLS = ("t3c-compile", "torch", "apache-tvm", "apache-tvm-ffi", "numpy")


def lower(
    model: ElasticGraphModule,
    profiles: ProfileSet,
    targets: Sequence[Target | str],
    path: str | os.PathLike[str],
    example_inputs: tuple[Tensor, ...],
    progress: bool = False,
    measured: bool = True,
    records: str | os.PathLike[str] | None = None,
    key: Key | None = None,
    exact_npu: bool = False,
) -> Path:
    """Lower every profile for every target into the artifact ``path`` (a folder, by custom called ``NAME.t3c``).

    The folder is written beside its final place and renamed at the end, so an artifact is whole or absent; one that
    stands at ``path`` already is replaced in that moment. Targets this machine can run are measured (50 calls a
    profile, batch 1 where the batch is free); the others keep their roofline estimate, and the costs say which.

    Args:
        example_inputs: what the exported graphs are traced with, as for ``transform``.
        measured: False leaves all latencies as the profiles have them.
        records: a file that ``tune`` wrote; kernels get the tiles found fastest there, then the shipped ones.
        key: an Ed25519 private key to sign with, a PEM file or its content as bytes.
        exact_npu: an NPU has the integer products alone and its host all that rounds, so that results are those of the
            other targets to the bit. It costs the host a pass over every layer's results.

    Raises:
        UnknownTargetError, UnsupportedOpError, RecordsError, CudaCompilerError, SigningKeyError: before any compiling.
        MemoryLimitError: a profile does not fit a target's memory.
        T3CError: a target was not among those that ``profiles`` were snapped for.
        VelaError: an NPU of ``targets`` cannot run a profile, or has too little memory for it.
        ArtifactError: the disk is full, the folder cannot be written, or ``path`` is something else than an artifact.
    """
    wanted = [get_target(target) if isinstance(target, str) else target for target in targets]
    if key is not None:
        private_key(key)  # what is wrong shows before the long work
    final = Path(path)
    require_free(final)
    _check_targets(model, profiles, wanted, example_inputs)
    own = None if records is None else Path(records)
    temporary = final.parent / f".{final.name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir()
        _write(temporary, model, profiles, wanted, example_inputs, progress, measured, own, exact_npu)
        if key is not None:
            sign(temporary, key)
        _put_in_place(temporary, final)
    except OSError as error:
        what = "the disk is full" if error.errno == errno.ENOSPC else str(error)
        raise ArtifactError(f"cannot write {final}: {what}; nothing was left behind") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def require_free(path: Path) -> None:
    """Raise :class:`ArtifactError` where no artifact can be written: what is replaced must be one."""
    if not path.absolute().parent.is_dir():
        raise ArtifactError(f"{path.parent} is not a folder: make it first, or choose another output")
    if path.exists() and not (path / MANIFEST).is_file():
        raise ArtifactError(f"{path} is there already and is no artifact: choose another output")


def _check_targets(
    model: ElasticGraphModule, profiles: ProfileSet, targets: Sequence[Target], example_inputs: tuple[Tensor, ...]
) -> None:
    """Refuse what was not snapped for and what does not fit, before the long work."""
    for target in targets:
        if target.kind == "cuda":
            require_compiler(str(target.tvm["arch"]))
        if target.name not in profiles.profiles[0].costs:
            known = ", ".join(profiles.profiles[0].costs)
            raise T3CError(f"the profiles were snapped for {known}, not for {target.name}: snap for all of them")
    activations = activation_bytes(model, example_inputs)
    for profile in profiles.profiles:
        require_fit(f"profile {profile.name}", profile.size_bytes, activations, targets, "snap again, for this target")


def _put_in_place(temporary: Path, final: Path) -> None:
    if final.exists():
        old = final.parent / f".{final.name}.{os.getpid()}.old"
        final.rename(old)
        temporary.rename(final)
        shutil.rmtree(old)
    else:
        temporary.rename(final)


def _write(
    folder: Path,
    model: ElasticGraphModule,
    profiles: ProfileSet,
    targets: Sequence[Target],
    example_inputs: tuple[Tensor, ...],
    progress: bool,
    measured: bool,
    records: Path | None,
    exact_npu: bool,
) -> None:
    # The compiler takes a second to load; importing it here keeps errors of the arguments at once.
    from t3c_compile.backends.tvm.build import build_library

    with progress_bar(progress) as bar:
        compiled = [target for target in targets if target.kind in ("cpu", "cuda")]
        # Steps: each profile, each target compiled, each target measured.
        task = bar.add_task("specialize", total=(len(profiles.profiles) if compiled else 0) + 2 * len(targets))

        def step() -> None:
            bar.advance(task)

        programs, store = export_profiles(model, profiles, example_inputs, step) if compiled else ({}, {})
        npu = None
        if len(compiled) < len(targets):
            npu = split_profiles(model, profiles, example_inputs, exact_npu)
            store |= npu.store()
        write_store(folder / STORE, {name: tensor.numpy() for name, tensor in store.items()})
        manifest: Manifest = {
            "schema": SCHEMA,
            "tools": {tool: version(tool) for tool in _TOOLS},
            "model": {"dense_int8_bytes": round(dense_int8_bytes(model)), "order": profiles.order},
            "profiles": [profile.to_json() for profile in profiles.profiles],
            "targets": {},
        }
        (folder / "lib").mkdir()
        if npu is not None:
            manifest["inputs"] = npu_inputs(model)
            manifest["targets"] |= lower_npu_targets(
                npu, [t for t in targets if t.kind == "ethos-u"], folder, bar, task
            )
        for target in compiled:
            bar.update(task, description=f"compile for {target.name}")
            library = build_library(programs, target, folder / "lib" / f"{target.name}.so", records)
            manifest["inputs"] = _described(library.inputs)
            manifest["targets"][target.name] = {
                "kind": target.kind,
                **described_library(library, target, folder),
                "costs": [dict(profile.costs[target.name]) for profile in profiles.profiles],
            }
            step()
        manifest["targets"] = {target.name: manifest["targets"][target.name] for target in targets}
        manifest["files"] = {
            str(path.relative_to(folder)): described(path) for path in sorted(folder.rglob("*")) if path.is_file()
        }
        del programs, store  # the process that measures has a copy of its own
        bar.update(task, description="measure")
        write_manifest(folder, manifest)
        if measured:
            _measure(folder, manifest, example_inputs, step)
            write_manifest(folder, manifest)


def _described(inputs: Sequence["TensorInfo"]) -> list[dict[str, Any]]:
    """Inputs as the manifest has them; export's symbol for the free batch becomes ``batch``."""
    symbol = next((info.shape[0] for info in inputs if info.shape and isinstance(info.shape[0], str)), None)
    return [
        {"name": info.name, "shape": ["batch" if s == symbol else s for s in info.shape], "dtype": info.dtype}
        for info in inputs
    ]


def export_profiles(
    model: ElasticGraphModule,
    profiles: ProfileSet,
    example_inputs: tuple[Tensor, ...],
    done: Callable[[], None] = lambda: None,
) -> tuple[dict[str, ExportedProgram], dict[str, Tensor]]:
    """Every profile as an exported program (by VM function name), and the one store they all read.

    ``done`` is called after each.
    """
    programs: dict[str, ExportedProgram] = {}
    store: dict[str, Tensor] = {}
    ranks = profiles.store_ranks()
    shapes = model.meta["t3c_dynamic_shapes"]
    inputs = traced_inputs(model, example_inputs)
    first: Graph | None = None
    for index, profile in enumerate(profiles.profiles):
        graph = specialize(model, profile.options, profile.activations, ranks)
        for name, tensor in [*graph.named_parameters(), *graph.named_buffers()]:
            if name in store:
                tensor.data = store[name]  # profiles hold one copy of what they share
        like = None
        if first is None:
            first = graph.graph
        elif differ_in_numbers_alone(first, graph.graph):
            like = renumbered(programs["profile_0"], graph.graph)
        programs[f"profile_{index}"] = like or torch.export.export(graph, inputs, dynamic_shapes=shapes, strict=False)
        store |= {name: tensor.detach().contiguous() for name, tensor in graph.state_dict().items()}
        done()
    return programs, store


def _measure(folder: Path, manifest: Manifest, example_inputs: tuple[Tensor, ...], done: Callable[[], None]) -> None:
    """Measure targets that run here: latencies, and energies where there is a meter, take the place of estimates; a
    simulated NPU's stay."""
    one = [bool(entry["shape"]) and entry["shape"][0] == "batch" for entry in manifest["inputs"]]
    inputs = [(x[:1] if first else x).numpy() for x, first in zip(example_inputs, one, strict=True)]
    batch = "batch 1" if all(one) else "the example inputs"
    for name, entry in manifest["targets"].items():
        if refusal(entry) is None and "npu" not in entry:
            for cost, found in zip(entry["costs"], measure(folder, name, entry["kind"], inputs), strict=True):
                cost |= {**found, "source": f"measured on the build machine, {batch}, {CALLS} calls"}
        done()
