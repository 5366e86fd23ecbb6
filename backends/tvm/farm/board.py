"""The process that measures an artifact's profiles: the number of one comes in, times and outputs go out (``session``).

Over RPC a tensor that is sent lives as long as its call, so weights are joined by TVM's cache on the device, whose
arrays hold their tensors.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from t3c_compile.backends.tvm.farm.session import serve
from t3c_compile.manifest import STORE, open_file, read_manifest
from t3c_compile.store import Store, read_store

import tvm  # isort: skip  # after what keeps torch out of it

_CPU, _POOLED = 1, 2  # TVM's numbers for the host and for the allocator that keeps what is given back


def _machine(library: Any) -> Any:
    machine = library["vm_load_executable"]()
    machine["vm_initialization"](_CPU, 0, _POOLED)
    return machine


def _packed(session: Any, library: Any, packs: dict[str, list[str]], store: Store) -> Any:
    """The weights that every profile takes, packed on the device. The machine that did it goes, and frees its own."""
    machine, cache = _machine(library), session.get_function("vm.builtin.tensor_cache.update")
    names: list[str] = []
    for function, stored in packs.items():
        machine["set_input"](function, *(tvm.runtime.tensor(store[name], session.cpu()) for name in stored))
        machine["invoke_stateful"](function)
        for place in range(machine["get_output_arity"](function)):
            names.append(f"{function}.{place}")
            cache(names[-1], machine["get_output"](function, place), True)
    weights = session.get_function("vm.builtin.param_array_from_cache_by_name_unpacked")(*names)
    session.get_function("vm.builtin.tensor_cache.clear")()
    return weights


def _outputs(machine: Any, function: str) -> list[Any]:
    count = machine["get_output_arity"](function)
    found = [machine["get_output"](function, *place) for place in ([()] if count < 0 else [(i,) for i in range(count)])]
    return [tensor.numpy() for tensor in found]


def _main(kind: str, address: str, key: str, artifact: str, target: str) -> None:
    folder = Path(artifact)
    manifest = read_manifest(folder)
    entry = manifest["targets"][target]
    with open_file(folder, manifest, STORE) as file:
        store = read_store(file)
    with open_file(folder, manifest, entry["library"]) as file:
        code = bytearray(file.read())

    def measure(session: Any, request: dict[str, Any]) -> dict[str, Any]:
        """Seconds of each call of a profile after a few that are not counted, and the threads it had."""
        name = Path(entry["library"]).name
        session.upload(code, name)
        library = session.load_module(name)
        session.remove(name)
        weights = _packed(session, library, entry["packs"], store)
        machine, function = _machine(library), entry["functions"][request["profile"]]
        with np.load(request["inputs"]) as given:
            inputs = [tvm.runtime.tensor(given[f"arr_{i}"], session.cpu()) for i in range(len(given.files))]
        machine["set_input"](function, *inputs, weights)
        for _ in range(request["warm_up"]):
            machine["invoke_stateful"](function)
        timed = machine.time_evaluator("invoke_stateful", session.cpu(), number=1, repeat=request["calls"])
        seconds = list(timed(function).results)
        np.savez(request["outputs"], *_outputs(machine, function))
        return {"seconds": seconds, "threads": session.get_function("runtime.NumThreads")()}

    serve(kind, address, key, measure)


if __name__ == "__main__":
    _main(*sys.argv[1:])
