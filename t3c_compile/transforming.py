"""``transform``: a model goes in, an elastic ``torch.fx.GraphModule`` comes out."""

import ctypes
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from t3c_compile.passes.capture import capture
from t3c_compile.passes.elastic import elastic_layers, full_width_known
from t3c_compile.passes.errors import NothingToCompressError, T3CError
from t3c_compile.passes.find_elastic_layers import Candidate, FindElasticLayers
from t3c_compile.passes.fit_inputs import require_fitting
from t3c_compile.passes.graph import ElasticGraphModule, own_parameters
from t3c_compile.passes.low_rank import svd_flops
from t3c_compile.passes.pipeline import Pipeline, default_pipeline
from t3c_compile.passes.record_moments import record_moments
from t3c_compile.progress import progress_bar

Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Config:
    """What the user may choose; JSON through :meth:`to_json` and :meth:`from_json`.

    Attributes:
        conv: form of k x k convolutions, ``tucker2`` or ``cp``.
        rank_multiple: the least rank worth keeping factors for; a layer that does not pay there stays dense.
        keep: glob patterns of layer names to leave alone.
    """

    conv: str = "tucker2"
    rank_multiple: int = 8
    keep: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"version": 1, **asdict(self), "keep": list(self.keep)}

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Config":
        """Raises :class:`T3CError` on an unknown version or field."""
        data = dict(data)
        if data.pop("version", None) != 1:
            raise T3CError("config: only version 1 is known")
        unknown = set(data) - set(asdict(Config()))
        if unknown:
            raise T3CError(f"config: unknown fields {', '.join(sorted(unknown))}")
        return replace(Config(**data), keep=tuple(data.get("keep", ())))


def transform(
    model: nn.Module,
    example_inputs: Inputs,
    config: Config | None = None,
    dynamic_shapes: Any = None,
    calibration: Iterable[Inputs] | None = None,
    progress: bool = False,
    resume: str | os.PathLike[str] | None = None,
) -> ElasticGraphModule:
    """Rewrite ``model`` into an elastic graph module; ``model`` itself is left as it was.

    At full rank and 32 bits (how it comes back) its outputs equal the model's to 1e-4 relative in float32. It trains,
    saves, copies and re-exports like any module; ``.report`` lists elastic layers, and kept ones with reasons.

    Args:
        model: any ``torch.export``-able module with float32 weights.
        example_inputs: positional inputs, used to capture the graph and to set first activation ranges.
        config: choices; the default suits most models.
        dynamic_shapes: as ``torch.export`` takes it; None keeps dimension 0 of every input free where it can.
        calibration: input tuples; with them SVD is whitened by the inputs' second moments.
        progress: show a progress bar with the time left.
        resume: a folder for the factors as they are made. A transform that was cut short finds there what it had made;
            what belongs to other weights or options is not read. Delete the folder when the model is saved.

    Raises:
        CaptureError, BadWeightsError, DataError, NothingToCompressError: before any long work.
        T3CError: the folder to resume from cannot be written to.
    """
    config = config or Config()
    with _pages_returned(), progress_bar(progress) as bar:
        task = bar.add_task("capture", total=None)
        elastic = capture(model, example_inputs, dynamic_shapes, share=True)
        elastic.meta["t3c_config"] = config
        given = None if calibration is None else [tuple(inputs) for inputs in calibration]
        for index, inputs in enumerate(given or ()):
            require_fitting(elastic, inputs, f"calibration batch {index}")
        pipeline = pipeline_of(config)
        pipeline.until(FindElasticLayers.name).run(elastic)
        work = _work(elastic)
        training = elastic.training
        elastic.eval()
        if given is not None:
            record_moments(elastic, given)
        if resume is not None:
            elastic.meta["t3c_resume"] = _folder(resume)
        bar.update(task, total=sum(work.values()))

        def done(candidate: Candidate) -> None:
            bar.update(task, description=candidate.layer, advance=work.get(candidate.layer, 0.0))

        elastic.meta["t3c_layer_done"] = done
        pipeline.after(FindElasticLayers.name).run(elastic)
        for key in ("t3c_moments", "t3c_resume", "t3c_layer_done"):
            elastic.meta.pop(key, None)
        bar.update(task, description="activation ranges")
        observe(elastic, [example_inputs])
        own_parameters(elastic, model)
    return elastic.train(training)


def pipeline_of(config: Config) -> Pipeline:
    """The passes ``transform`` runs after capture."""
    return default_pipeline(FindElasticLayers(config.conv, config.rank_multiple, " ".join(config.keep)))


@contextmanager
def _pages_returned() -> Iterator[None]:
    """Within, glibc gives every tensor pages of its own, which go back when it is freed.

    From its heap, freed tensors would stay as holes between the factors that are kept: a fifth of the model.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    mallopt(mmap_threshold, 1 << 16)
    try:
        yield
    finally:
        # What glibc's own moving thresholds come to in a process that frees large tensors.
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 64 << 20)


def _folder(path: str | os.PathLike[str]) -> Path:
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise T3CError(f"the folder to resume from, {folder}, cannot be made: {error}") from error
    return folder


def _work(elastic: ElasticGraphModule) -> dict[str, float]:
    """Operations to decompose each layer found, nearly."""
    found = [node.meta.get("t3c_candidate") for node in elastic.eval_graph.nodes]
    candidates = [candidate for candidate in found if isinstance(candidate, Candidate)]
    if not candidates:
        kept = "; ".join(f"{r.layer} ({r.op}): {r.reason}" for r in elastic.report.kept.values())
        raise NothingToCompressError(
            "the model has nothing to compress: no linear, convolution or embedding with a float32 weight of its own"
            + (f". Kept: {kept}" if kept else "")
        )
    work: dict[str, float] = {}
    for candidate in candidates:
        weight = candidate.weight.of(elastic)
        sides = {"dense": 0, "svd": 1}.get(candidate.form, 2)
        sizes = [(size, weight.numel() // size) for size in weight.shape[:sides]]
        work[candidate.layer] = weight.numel() + sum(svd_flops(m, n) for m, n in sizes)
    return work


@torch.no_grad()
def observe(elastic: ElasticGraphModule, batches: Iterable[Inputs]) -> None:
    """Set activation ranges from ``batches`` at the present ranks and bits, as a moving average over them.

    The evaluation graph is run with only the quantizers observing: batch norm and dropout stay in eval mode.
    """
    training = elastic.training
    elastic.eval()
    layers = [layer for _, layer in elastic_layers(elastic)]
    quantizers = [
        quantizer
        for layer in layers
        for quantizer in (layer.x_quant, layer.h_quant, layer.g_quant)
        if quantizer is not None
    ]
    for quantizer in quantizers:
        quantizer.reset()
        quantizer.training = True
    try:
        with full_width_known(elastic):
            for inputs in batches:
                elastic(*inputs)
    finally:
        elastic.train(training)
