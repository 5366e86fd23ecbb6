"""What each layer takes at each rank on a target, measured by its kernels alone."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from t3c_compile.backends.targets import Target
from t3c_compile.chain import Grid, paying_ranks
from t3c_compile.cost import LayerTimes, Times
from t3c_compile.passes.elastic import ElasticLayer, elastic_layers
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.progress import progress_bar
from t3c_compile.tuning import open_records

if TYPE_CHECKING:
    from t3c_compile.backends.tvm.kernels.isa import Isa
    from t3c_compile.backends.tvm.tuning.workload import Workload

# Between them a layer's time is nearly a straight line of the rank.
_MOST_RANKS = 6


def kernel_times(
    model: ElasticGraphModule,
    grid: Grid,
    target: Target,
    records: str | os.PathLike[str],
    example_inputs: tuple[Any, ...],
    threads: int | None = None,
    rpc: Sequence[str] = (),
    tracker: str | None = None,
    key: str = "",
    progress: bool = False,
) -> Times:
    """Time every elastic layer of ``model`` dense and at some ranks of ``grid``, one sample a call.

    What the file ``records`` holds is not measured again, so that one file always gives the same times, and a killed
    run goes on. They are those of kernels as they are untuned: tuning must not change what was chosen before it.

    Args:
        example_inputs: inputs of the model, which say what every layer's input is like.
        threads: how many the kernels run on; all cores of the target unless given.
        rpc: as for :func:`t3c_compile.tuning.tune`, like ``tracker`` and ``key``.

    Raises:
        TuningError, RecordsError, DeviceError: as for :func:`t3c_compile.tuning.tune`.
    """
    file = open_records(records, target, bool(rpc or tracker))
    from t3c_compile.backends.tvm.farm.devices import find_devices
    from t3c_compile.backends.tvm.kernels.isa import isa_for
    from t3c_compile.backends.tvm.tuning.runner import Runner
    from t3c_compile.backends.tvm.tuning.search import Search

    threads = threads or int(str(target.tvm["num-cores"]))
    ranks = {name: [0, *_thinned(paying_ranks(layer, grid))] for name, layer in elastic_layers(model)}
    found = layer_workloads(model, isa_for(target), example_inputs, ranks)
    workloads = Counter(w for by_rank in found.values() for calls in by_rank.values() for w in calls)
    if not workloads:
        return {}
    with ExitStack() as stack, progress_bar(progress) as bar:
        runners = [stack.enter_context(Runner(target, threads, d)) for d in find_devices(rpc, tracker, key)]
        search = Search(workloads, target, file, runners, threads, {}, lambda _: ())
        task = bar.add_task("times of the layers", total=len(workloads))
        search.baseline(lambda number, count: bar.update(task, completed=number, total=count))
        seconds = {standing.workload.key: standing.default_seconds for standing in search.standings()}
    return {name: _layer_times(by_rank, seconds) for name, by_rank in found.items()}


def layer_workloads(
    model: ElasticGraphModule, isa: "Isa", example_inputs: tuple[Any, ...], ranks: Mapping[str, Sequence[int]]
) -> "dict[str, dict[int, list[Workload]]]":
    """Of every layer that is an integer product, at its ``ranks``: the kernel of each of its calls."""
    from t3c_compile.backends.tvm.tuning.layers import is_integer_product, layer_workload

    shapes = _input_shapes(model, example_inputs)
    return {
        name: {rank: [layer_workload(isa, layer, rank, shape) for shape in shapes[name]] for rank in ranks[name]}
        for name, layer in elastic_layers(model)
        if is_integer_product(layer)
    }


def _layer_times(by_rank: "Mapping[int, Sequence[Workload]]", seconds: Mapping[str, float]) -> LayerTimes:
    milliseconds = {rank: 1e3 * sum(seconds[workload.key] for workload in calls) for rank, calls in by_rank.items()}
    dense = milliseconds.pop(0)
    return LayerTimes(dense, tuple(milliseconds), tuple(milliseconds.values()))


def _thinned(ranks: Sequence[int]) -> list[int]:
    """At most ``_MOST_RANKS`` of ``ranks``, evenly, both ends among them."""
    places = np.linspace(0, len(ranks) - 1, min(len(ranks), _MOST_RANKS)).round().astype(int)
    return [ranks[place] for place in places]


def _input_shapes(model: ElasticGraphModule, inputs: tuple[Any, ...]) -> dict[str, list[tuple[int | str, ...]]]:
    """The shape of every layer's input at each of its calls, in ``batch`` where the batch is free."""
    if not model.meta["t3c_batch_is_free"]:
        return _shapes_for(model, inputs, len(inputs[0]))
    one, two = (_shapes_for(model, inputs, samples) for samples in (1, 2))

    def size(first: int, second: int) -> int | str:
        return first if first == second else "batch" if first == 1 else f"batch*{first}"

    return {
        name: [tuple(map(size, *shapes)) for shapes in zip(calls, two[name], strict=True)]
        for name, calls in one.items()
    }


def _shapes_for(model: ElasticGraphModule, inputs: tuple[Any, ...], samples: int) -> dict[str, list[Any]]:
    """The shapes for so many copies of the first sample, or for the inputs as they are where these are their number."""
    given = [
        torch.cat([x[:1]] * samples) if isinstance(x, Tensor) and x.dim() and len(x) != samples else x for x in inputs
    ]
    shapes: dict[str, list[Any]] = {name: [] for name, _ in elastic_layers(model)}

    def note(name: str) -> Any:
        def hook(_: ElasticLayer, arguments: tuple[Any, ...]) -> None:
            shapes[name].append(tuple(arguments[0].shape))

        return hook

    hooks = [layer.register_forward_pre_hook(note(name)) for name, layer in elastic_layers(model)]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(*given)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return shapes
