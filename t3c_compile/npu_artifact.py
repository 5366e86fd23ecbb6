"""What ``lower`` writes for NPU targets: the host's libraries, partitions as TOSA, and command streams."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import Progress, TaskID
from torch import Tensor

from t3c_compile.backends.targets import Target, machine
from t3c_compile.manifest import described
from t3c_compile.passes.errors import T3CError
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.infer_values import InputSpec
from t3c_compile.passes.specialize import specialize
from t3c_compile.profile import ProfileSet

if TYPE_CHECKING:
    from t3c_compile.backends.ethosu.build import NpuProfiles
    from t3c_compile.backends.tvm.build import Library


def described_library(library: "Library", target: Target, folder: Path) -> dict[str, Any]:
    """A library as the manifest has it, in its place in the artifact ``folder``."""
    # Named by content: the loader takes one path for one library, even when the file there was replaced.
    name = f"lib/{library.path.stem}-{described(library.path)['sha256'][:12]}.so"
    library.path.rename(folder / name)
    return {
        "machine": machine(target),
        "features": list((target.host or target).features),
        **({"arch": target.tvm["arch"]} if target.kind == "cuda" else {}),
        "library": name,
        "functions": list(library.functions),
        "packs": {function: list(names) for function, names in library.packs.items()},
        "kernels": dict(library.kernels),
    }


def npu_inputs(model: ElasticGraphModule) -> list[dict[str, Any]]:
    """The model's inputs as the manifest has them: what an NPU target takes, a free batch one sample at a time.

    Raises:
        T3CError: another size is free; an NPU is compiled for fixed ones.
    """
    inputs = []
    names = [node.name for node in model.eval_graph.nodes if node.op == "placeholder"]
    for name, spec in zip(names, model.meta["t3c_inputs"], strict=True):
        if not isinstance(spec, InputSpec) or not all(isinstance(size, int) for size in spec.shape[1:]):
            raise T3CError(
                f"input {name!r} has a free size beside its batch, and an NPU is compiled for fixed ones: transform "
                "the model with dynamic_shapes that leave the batch alone free"
            )
        batch = ["batch"] if model.meta["t3c_batch_is_free"] else list(spec.shape[:1])
        inputs.append(
            {"name": name, "shape": [*batch, *spec.shape[1:]], "dtype": str(spec.dtype).removeprefix("torch.")}
        )
    return inputs


def split_profiles(
    model: ElasticGraphModule, profiles: ProfileSet, example_inputs: tuple[Tensor, ...], exact: bool = False
) -> "NpuProfiles":
    """The profiles as NPU and host share them, at batch 1; ``exact``: with the bits of every other target."""
    from t3c_compile.backends.ethosu.build import NpuProfiles

    npu_inputs(model)
    free, ranks = model.meta["t3c_batch_is_free"], profiles.store_ranks()
    inputs = tuple(x[:1] if free else x for x in example_inputs)
    graphs = [specialize(model, profile.options, profile.activations, ranks) for profile in profiles.profiles]
    return NpuProfiles.of(graphs, inputs, exact)


def lower_npu_targets(
    npu: "NpuProfiles", targets: Sequence[Target], folder: Path, bar: Progress, task: TaskID
) -> dict[str, dict[str, Any]]:
    """Write what ``targets`` need into ``folder``; the manifest's entry of each."""
    bar.update(task, description="compile for the host of an NPU")
    device, *here = (described_library(*built, folder) for built in npu.build_hosts(folder / "lib"))
    tosa = npu.write_partitions(folder / "npu")
    entries = {}
    for target in targets:
        bar.update(task, description=f"compile for {target.name}")
        compiled = npu.compile(target, folder / "npu", tosa)
        bar.advance(task)
        costs = compiled.pop("costs")
        entries[target.name] = {"kind": target.kind, **device, "costs": costs, "npu": compiled, "simulated": here}
    return entries
