"""``transform``: a model goes in, an elastic ``torch.fx.GraphModule`` comes out."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.progress import Progress
from torch import nn

from t3c_compile.passes.base import Pass
from t3c_compile.passes.capture import capture
from t3c_compile.passes.elastic import elastic_layers
from t3c_compile.passes.errors import NothingToCompressError, T3CError
from t3c_compile.passes.find_elastic_layers import FindElasticLayers
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.pipeline import Pipeline, default_pipeline
from t3c_compile.passes.record_moments import record_moments

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
        progress: show a progress bar.

    Raises:
        CaptureError, BadWeightsError, NothingToCompressError: before any long work.
    """
    config = config or Config()
    elastic = capture(model, example_inputs, dynamic_shapes)
    elastic.meta["t3c_config"] = config
    pipeline = pipeline_of(config)
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("transform", total=len(pipeline.passes))

        def before(p: Pass) -> None:
            bar.update(task, description=p.name, advance=1)

        pipeline.until(FindElasticLayers.name).run(elastic, before)
        _require_candidates(elastic)
        training = elastic.training
        elastic.eval()
        if calibration is not None:
            record_moments(elastic, calibration)
        pipeline.after(FindElasticLayers.name).run(elastic, before)
        elastic.meta.pop("t3c_moments", None)
    observe(elastic, [example_inputs])
    return elastic.train(training)


def pipeline_of(config: Config) -> Pipeline:
    """The passes ``transform`` runs after capture."""
    return default_pipeline(FindElasticLayers(config.conv, config.rank_multiple, " ".join(config.keep)))


def _require_candidates(elastic: ElasticGraphModule) -> None:
    if not any("t3c_candidate" in node.meta for node in elastic.eval_graph.nodes):
        kept = "; ".join(f"{r.layer} ({r.op}): {r.reason}" for r in elastic.report.kept.values())
        raise NothingToCompressError(
            "the model has nothing to compress: no linear or 2-d convolution with a float32 parameter of its own"
            + (f". Kept: {kept}" if kept else "")
        )


@torch.no_grad()
def observe(elastic: ElasticGraphModule, batches: Iterable[Inputs]) -> None:
    """Set activation ranges from ``batches`` at the present ranks and bits, as a moving average over them.

    The evaluation graph is run with only the quantizers observing: batch norm and dropout stay in eval mode.
    """
    training = elastic.training
    elastic.eval()
    quantizers = [
        quantizer
        for _, layer in elastic_layers(elastic)
        for quantizer in (layer.x_quant, layer.h_quant, layer.g_quant)
        if quantizer is not None
    ]
    for quantizer in quantizers:
        quantizer.reset()
        quantizer.training = True
    try:
        for inputs in batches:
            elastic(*inputs)
    finally:
        elastic.train(training)
