"""Every elastic layer gets its controller hook: the gate that holds its rank mask and width."""

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from t3c_compile.passes.base import Pass, elastic_calls


@dataclass(frozen=True)
class InsertHooks(Pass):
    """Adds a ``Gate`` (buffers ``<layer>.gate.mask`` and ``<layer>.gate.bits``), open at full rank and 32 bits."""

    name: ClassVar[str] = "insert-hooks"

    def requires(self, gm: GraphModule) -> None:
        bare = [str(node.target) for node, layer in elastic_calls(gm) if layer.x_quant is None]
        if bare:
            raise self.fail(f"layers without quantizers (run insert-quantizers first): {', '.join(bare)}")

    def apply(self, gm: GraphModule) -> bool:
        bare = [layer for _, layer in elastic_calls(gm) if layer.gate is None]
        for layer in bare:
            layer.add_gate()
        return bool(bare)
