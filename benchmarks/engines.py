"""Engines that ``benchmarks/latency.py`` compares: how each prepares a model, and how each runs it.

``prepare`` writes what the engine needs into a folder, once; ``open_engine`` gives a function of one call. Run as
a program, this file is the process of one engine: it answers every input line ``run N`` with N times in milliseconds,
and ``cpu N`` with N times that its threads had the processor.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from examples.models import Builder

Array = np.ndarray[Any, Any]
Call = Callable[[], Array]

# Multiply-adds of an elastic profile as a fraction of the dense model's.
FRACTIONS = {"t3c_dense": 1.0, "t3c_half": 0.5, "t3c_quarter": 0.25}
ENGINES = (
    "torch_eager",
    "torch_compile",
    "onnxruntime_fp32",
    "onnxruntime_int8",
    "openvino_int8",
    "executorch_int8",
    *FRACTIONS,
)
INT8_PEERS = ("onnxruntime_int8", "openvino_int8", "executorch_int8")
_CALIBRATION = 8


def cpu_name() -> str:
    """This machine's CPU family, and the instruction set that it lets kernels use: virtual machines may hide some."""
    from t3c_compile.backends.targets import host_target
    from t3c_compile.backends.tvm.tuning.records import cpu_of

    target = host_target()
    return f"{cpu_of(target)} {target.simd}"


def builder(name: str) -> "Builder":
    """One of ``examples/models``."""
    from examples.models import language, vision

    return {**vision.MODELS, **language.MODELS}[name]


def inputs_of(name: str, batch: int, count: int = 1) -> list[tuple[Any, ...]]:
    """``count`` seeded batches of unpadded inputs."""
    import torch

    example = [x[:1] for x in builder(name).inputs(False)]
    torch.manual_seed(7)
    batches = []
    for _ in range(count):
        drawn = [
            torch.randn(batch, *x.shape[1:])
            if x.is_floating_point()
            else x.flatten()[torch.randint(x.numel(), (batch, *x.shape[1:]))]
            for x in example
        ]
        batches.append(tuple(drawn))
    return batches


def prepare(engine: str, name: str, batch: int, folder: Path) -> None:
    """Write the engine's form of the model, its inputs and torch's float32 logits into ``folder``."""
    import torch

    torch.manual_seed(0)
    model = builder(name).build(False).eval()
    batches = inputs_of(name, batch, _CALIBRATION)
    with torch.no_grad():
        expected = model(*batches[0])
    np.savez(folder / "case.npz", *[x.numpy() for x in batches[0]], expected=expected.numpy())
    if engine.startswith("onnxruntime") or engine.startswith("openvino"):
        _prepare_onnx(engine, model, batches, folder)
    elif engine == "executorch_int8":
        _prepare_executorch(model, batches, folder)
    elif engine in FRACTIONS:
        import t3c_compile

        elastic, profiles = one_profile(model, batches, FRACTIONS[engine], folder.parent.parent / "times.jsonl")
        t3c_compile.lower(elastic, profiles, ["x86_64"], folder / "model.t3c", batches[0])


def _prepare_onnx(engine: str, model: Any, batches: Sequence[tuple[Any, ...]], folder: Path) -> None:
    import torch

    torch.onnx.export(model, batches[0], folder / "float.onnx", dynamo=True, external_data=False, verbose=False)
    if engine == "onnxruntime_int8":
        from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        quant_pre_process(folder / "float.onnx", folder / "clean.onnx")
        import onnxruntime

        names = [x.name for x in onnxruntime.InferenceSession(folder / "clean.onnx").get_inputs()]

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                self.left = iter(batches)

            def get_next(self) -> dict[str, Array] | None:
                batch = next(self.left, None)
                return batch and {n: x.numpy() for n, x in zip(names, batch, strict=True)}

        # uint8 activations are the fast ones on x86.
        kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(folder / "clean.onnx", folder / "int8.onnx", Reader(), per_channel=True, **kinds)
    elif engine == "openvino_int8":
        import nncf
        import openvino

        floating = openvino.convert_model(folder / "float.onnx")
        data = nncf.Dataset([[x.numpy() for x in batch] for batch in batches])
        kind = nncf.ModelType.TRANSFORMER if "MatMul" in {op.get_type_name() for op in floating.get_ops()} else None
        openvino.save_model(nncf.quantize(floating, data, model_type=kind), folder / "int8.xml", compress_to_fp16=False)


def _prepare_executorch(model: Any, batches: Sequence[tuple[Any, ...]], folder: Path) -> None:
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(torch.export.export(model, batches[0]).module(), quantizer)
    for batch in batches:
        prepared(*batch)
    program = torch.export.export(convert_pt2e(prepared), batches[0])
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    (folder / "model.pte").write_bytes(lowered.to_executorch().buffer)


def one_profile(
    model: Any, batches: Sequence[tuple[Any, ...]], fraction: float, records: Path | None = None
) -> tuple[Any, Any]:
    """The elastic model and a set of one profile: every layer dense, or a ``fraction`` of the multiply-adds.

    Weights have 8 bits, but 7 on a CPU with AVX2 alone: products of bytes overflow its int16, so the other engines take
    what comes of that or halve the weights; 8 bits without error take a fifth more time. With a fraction every layer
    has the greatest rank within the same share of its own multiply-adds, but where it is dense because its factors are
    slower on this machine, by the times in ``records`` (which gets what it lacks).
    """
    import t3c_compile
    from t3c_compile.backends.targets import get_target
    from t3c_compile.chain import Grid
    from t3c_compile.cost import layer_cost
    from t3c_compile.kernel_times import kernel_times
    from t3c_compile.passes.elastic import elastic_layers
    from t3c_compile.passes.option import Option
    from t3c_compile.profile import Profile, ProfileSet
    from t3c_compile.transforming import Config, observe

    target = get_target("x86_64")
    bits = 7 if target.simd == "avx2" else 8
    grid = Grid(10**9 if fraction == 1 else 16, (bits,))
    elastic = t3c_compile.transform(model, batches[0], Config(rank_multiple=grid.rank_multiple), calibration=None)
    elastic.set_attention_dtype("int8")
    elastic.set_residual_dtype("int8")
    layers = dict(elastic_layers(elastic))
    dense = {name: float(layer_cost(layer, "dense").at(0, bits)[0]) for name, layer in layers.items()}
    costs = {name: layer_cost(layer) for name, layer in layers.items()}
    times = {}
    if records is not None and fraction < 1:
        one = tuple(x[:1] for x in batches[0])
        times = kernel_times(elastic, grid, target, records, one)

    def chosen(share: float) -> dict[str, Option]:
        options = {}
        for name, layer in layers.items():
            ranks = range(16, layer.max_rank + 1, 16) if layer.form != "dense" else ()
            fitting = [rank for rank in ranks if float(costs[name].at(rank, bits)[0]) <= share * dense[name]]
            slow = fitting and name in times and not times[name].pays(fitting[-1])
            factors = fitting and not slow
            options[name] = Option(layer.form, fitting[-1], bits) if factors else Option("dense", 0, bits)
        return options

    def multiply_adds(options: dict[str, Option]) -> float:
        return sum(float(costs[n].at(o.rank, bits)[0]) if o.rank else dense[n] for n, o in options.items())

    shares = (fraction * (1 - step / 100) for step in range(100))
    within = (o for o in map(chosen, shares) if multiply_adds(o) <= fraction * sum(dense.values()))
    options = next(within, None)
    if options is None:
        raise RuntimeError(f"layers whose factors are slower than dense here leave more than {fraction} multiply-adds")
    elastic.eval().set_options(options)
    observe(elastic, batches)
    activations = {name: layer.activations() for name, layer in layers.items()}
    cost = {"latency_ms": 0.0, "energy_mj": 0.0, "source": "none"}
    # Nothing is said of quality: only the time counts here.
    profile = Profile("p0", options, activations, 0, {"kl": 0.0}, {"bound": 0.0}, {"x86_64": dict(cost)})
    return elastic, ProfileSet([profile], "by hand")


def open_engine(engine: str, name: str, folder: Path, threads: int) -> Call:
    """A function that runs one call on the prepared inputs and returns the logits."""
    with np.load(folder / "case.npz") as case:
        arrays = [case[key] for key in case.files if key != "expected"]
    if engine in FRACTIONS:
        import t3c_compile

        session = t3c_compile.load(folder / "model.t3c")
        return lambda: session.run(*arrays)
    if engine.startswith("onnxruntime"):
        return open_onnxruntime(folder / ("int8.onnx" if engine.endswith("int8") else "float.onnx"), arrays, threads)
    if engine == "openvino_int8":
        return open_openvino(folder / "int8.xml", arrays, threads)
    import torch

    torch.set_num_threads(threads)
    tensors = tuple(torch.from_numpy(x) for x in arrays)
    if engine == "executorch_int8":
        from executorch.runtime import Runtime

        method = Runtime.get().load_program(folder / "model.pte").load_method("forward")
        return lambda: method.execute(tensors)[0].numpy()
    torch.manual_seed(0)
    model = builder(name).build(False).eval()
    if engine == "torch_compile":
        import torch._inductor.config

        torch._inductor.config.freezing = True
        model = torch.compile(model)

    def call() -> Array:
        with torch.no_grad():
            logits: Array = model(*tensors).numpy()
        return logits

    return call


def open_openvino(path: Path, arrays: list[Array], threads: int) -> Call:
    """A function of one call, which gives the first output."""
    import openvino

    properties = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    request = openvino.Core().compile_model(path, "CPU", properties).create_infer_request()
    return lambda: next(iter(request.infer(arrays).values()))


def open_onnxruntime(path: Path, arrays: list[Array], threads: int) -> Call:
    """A function of one call, which gives the first output."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feeds = {x.name: array for x, array in zip(session.get_inputs(), arrays, strict=True)}
    return lambda: session.run(None, feeds)[0]


def serve(open_engine: Callable[[str, str, Path, int], Call], arguments: Sequence[str]) -> None:
    """Be the process of an engine; ``arguments`` are its name, the model's, the folder and the number of threads."""
    engine, name, folder, threads = arguments
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: int(threads)]))
    call = open_engine(engine, name, Path(folder), int(threads))
    found = call()
    with np.load(Path(folder) / "case.npz") as case:
        expected = case["expected"]
    error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    print(json.dumps({"error": error}), flush=True)
    for line in sys.stdin:
        times = []
        clock = time.process_time if line.startswith("cpu") else time.perf_counter
        for _ in range(int(line.split()[1])):
            start = clock()
            call()
            times.append(1e3 * (clock() - start))
        print(json.dumps(times), flush=True)


if __name__ == "__main__":
    serve(open_engine, sys.argv[1:])
