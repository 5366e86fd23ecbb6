"""Engines that ``benchmarks/decode.py`` compares on one decoding step, as ``benchmarks/engines.py`` has those of whole
networks: ``prepare`` writes what an engine needs, and as a program this file is the process of one engine.

A model is named ``tinyllama-N``: TinyLlama-1.1B's widths with N layers, random weights, and a cache of 128 tokens.
Peers are given a graph of fixed sizes, and round activations to int8 inside their products, as they do by default.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engines import Call, serve

ENGINES = (
    "t3c_int8",
    "t3c_int4",
    "onnxruntime_int8",
    "onnxruntime_int4",
    "openvino_int8",
    "openvino_int4",
)
_LENGTH, _POSITION = 128, 100


def prepare(engine: str, name: str, batch: int, folder: Path) -> None:
    """Write the engine's form of the decoder, one step's inputs and torch's float32 logits into ``folder``."""
    import torch

    from examples import decode_llama

    decoder = decode_llama.build(False, num_hidden_layers=int(name.rpartition("-")[2]))
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(2, 32000, (batch, 1), generator=generator)
    caches = [torch.randn(x.shape, generator=generator) for x in decode_llama.empty_caches(decoder, batch, _LENGTH)]
    inputs = (ids, torch.tensor([_POSITION]), *caches)
    with torch.no_grad():
        expected = decoder(*inputs)[0]
    np.savez(folder / "case.npz", *[x.numpy() for x in inputs], expected=expected.numpy())
    bits = int(engine[-1])
    if engine.startswith("t3c"):
        _prepare_t3c(decoder, inputs, bits, folder)
        return
    torch.onnx.export(decoder, inputs, folder / "float.onnx", dynamo=True, external_data=True, verbose=False)
    if engine.startswith("onnxruntime"):
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        # Level 4, int8 sums, is the fast one.
        quantizer = MatMulNBitsQuantizer(
            str(folder / "float.onnx"), bits, block_size=32, is_symmetric=True, accuracy_level=4
        )
        quantizer.process()
        quantizer.model.save_model_to_file(str(folder / "quantized.onnx"), True)
    else:
        import nncf
        import openvino

        modes = {4: nncf.CompressWeightsMode.INT4_SYM, 8: nncf.CompressWeightsMode.INT8_SYM}
        # All layers: else the first and the last stay at 8 bits.
        narrow: dict[str, Any] = {"ratio": 1.0, "group_size": 128, "all_layers": True} if bits == 4 else {}
        floating = openvino.convert_model(folder / "float.onnx")
        openvino.save_model(nncf.compress_weights(floating, mode=modes[bits], **narrow), folder / "quantized.xml")
    for path in folder.glob("float.*"):
        path.unlink()


def _prepare_t3c(decoder: Any, inputs: tuple[Any, ...], bits: int, folder: Path) -> None:
    """Every layer dense at one width, weight-only; batch and number of tokens free."""
    import t3c_compile
    from examples import decode_llama
    from t3c_compile.passes.elastic import elastic_layers
    from t3c_compile.passes.option import Option
    from t3c_compile.profile import Profile, ProfileSet
    from t3c_compile.transforming import Config

    shapes = decode_llama.dynamic_shapes(decoder, _LENGTH)
    ids, _, *caches = inputs
    # Traced with more than one row and token, which a size of one would fix.
    traced = (ids.repeat(2, 3), inputs[1], *(cache.repeat(2, 1, 1, 1) for cache in caches))
    elastic = t3c_compile.transform(decoder, traced, Config(rank_multiple=10**9), dynamic_shapes=shapes).eval()
    elastic.set_activation_dtype("float32")
    options = {name: Option("dense", 0, bits) for name, _ in elastic_layers(elastic)}
    cost = {"latency_ms": 0.0, "energy_mj": 0.0, "source": "none"}
    none: dict[str, dict[str, tuple[float, int]]] = {name: {} for name in options}
    profile = Profile("p0", options, none, 0, {"kl": 0.0}, {"bound": 0.0}, {"x86_64": cost})
    path = folder / "model.t3c"
    t3c_compile.lower(elastic, ProfileSet([profile], "by hand"), ["x86_64"], path, traced, measured=False)


def open_engine(engine: str, name: str, folder: Path, threads: int) -> Call:
    """A function that runs one step on the prepared inputs and returns the logits."""
    with np.load(folder / "case.npz") as case:
        arrays = [case[key] for key in case.files if key != "expected"]
    if engine.startswith("t3c"):
        import t3c_compile

        session = t3c_compile.load(folder / "model.t3c")
        return lambda: session.run(*arrays)[0]
    if engine.startswith("onnxruntime"):
        from benchmarks.engines import open_onnxruntime

        return open_onnxruntime(folder / "quantized.onnx", arrays, threads)
    from benchmarks.engines import open_openvino

    return open_openvino(folder / "quantized.xml", arrays, threads)


if __name__ == "__main__":
    serve(open_engine, sys.argv[1:])
