"""Every elastic layer gets its quantizers: nested integers for weights, observers for activations."""

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from t3c_compile.passes.base import Pass, elastic_calls


@dataclass(frozen=True)
class InsertQuantizers(Pass):
    """Adds activation quantizers (input and middles) and switches weight rounding on, at the width of the gate."""

    name: ClassVar[str] = "insert-quantizers"

    def requires(self, gm: GraphModule) -> None:
        if not any(True for _ in elastic_calls(gm)):
            raise self.fail("the graph has no elastic layer: run decompose-linear or decompose-conv first")

    def apply(self, gm: GraphModule) -> bool:
        bare = [layer for _, layer in elastic_calls(gm) if layer.x_quant is None]
        for layer in bare:
            layer.add_quantizers()
            layer.train(gm.training)
        return bool(bare)

    def ensures(self, gm: GraphModule) -> None:
        bare = [str(node.target) for node, layer in elastic_calls(gm) if layer.x_quant is None]
        if bare:
            raise self.fail(f"layers without quantizers: {', '.join(bare)}")
