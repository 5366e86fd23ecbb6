"""Our passes between a user's own in a ``torch.fx`` PassManager: `python examples/fx_pass_manager.py`.

One manager makes a captured model elastic, with a user's pass before ours; another takes the deployed graph to plain
ATen ops, with a user's pass after ours.
"""

import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager

from t3c_compile.passes.capture import capture
from t3c_compile.passes.elastic import elastic_layers
from t3c_compile.passes.express_in_aten import ExpressInAten
from t3c_compile.passes.fold_batch_norm import FoldBatchNorm
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.option import Option
from t3c_compile.passes.pipeline import default_pipeline
from t3c_compile.passes.specialize import Specialize
from t3c_compile.transforming import observe

aten = torch.ops.aten


class Net(nn.Module):
    """[N, 3, 8, 8] to [N, 10]; its activation is SiLU in other words."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, 2, 1, bias=False)
        self.norm, self.head = nn.BatchNorm2d(32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.norm(self.wide(x * torch.sigmoid(x))))
        return self.head(x.mean((2, 3)))


class FuseSilu(PassBase):
    """A user's pass before ours: x * sigmoid(x) is one op."""

    def call(self, graph_module: GraphModule) -> PassResult:
        modified = False
        for node in graph_module.graph.find_nodes(op="call_function", target=aten.sigmoid.default):
            (x,), users = node.args, list(node.users)
            if (
                len(users) == 1
                and users[0].target in (aten.mul.Tensor, operator.mul)
                and set(users[0].args) == {x, node}
            ):
                self._replace(users[0], x)
                modified = True
        graph_module.graph.eliminate_dead_code()
        graph_module.recompile()
        return PassResult(graph_module, modified)

    def _replace(self, product: Node, x: Node) -> None:
        with product.graph.inserting_before(product):
            silu = product.graph.call_function(aten.silu.default, (x,))
        silu.meta = dict(product.meta)
        product.replace_all_uses_with(silu)


class ReluAsClamp(PassBase):
    """A user's pass after ours, on the deployed graph in plain ATen ops."""

    def call(self, graph_module: GraphModule) -> PassResult:
        nodes = graph_module.graph.find_nodes(op="call_function", target=aten.relu.default)
        for node in nodes:
            node.target, node.args = aten.clamp_min.default, (node.args[0], 0)
        graph_module.recompile()
        return PassResult(graph_module, bool(nodes))


def on_both_graphs(apply: Callable[[GraphModule], PassResult | None]) -> Callable[[GraphModule], PassResult]:
    """A pass over an elastic module, which has a training and an evaluation graph over the same layers."""

    def run(elastic: GraphModule) -> PassResult:
        assert isinstance(elastic, ElasticGraphModule)
        elastic.run_pass(apply)
        return PassResult(elastic, True)

    return run


def make_elastic(model: nn.Module, x: Tensor) -> ElasticGraphModule:
    """What ``transform`` does, with the user's pass first."""
    elastic = capture(model, (x,))
    passes = [FuseSilu(), *default_pipeline().passes]
    PassManager([on_both_graphs(p) for p in passes])(elastic)
    observe(elastic, [(torch.randn(64, 3, 8, 8),)])
    return elastic.eval()


def deploy(elastic: ElasticGraphModule, bits: int) -> GraphModule:
    """The elastic graph at full rank and ``bits``, as plain ATen ops, with the user's pass last."""
    options = {name: Option(layer.form, layer.max_rank, bits) for name, layer in elastic_layers(elastic)}
    activations = {name: layer.activations() for name, layer in elastic_layers(elastic)}
    graph = GraphModule(elastic, elastic.eval_graph)
    manager = PassManager([Specialize(options, activations), FoldBatchNorm(), ExpressInAten(), ReluAsClamp()])
    result = manager(graph)
    assert result is not None
    return result.graph_module


def main() -> dict[str, float]:
    """Largest difference from the plain model over its largest logit, by graph."""
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(16, 3, 8, 8)
    expected = model(x)
    elastic = make_elastic(model, x)
    results = {"elastic": elastic(x), "8 bits": deploy(elastic, 8)(x)}
    differences = {
        name: float((result - expected).abs().max() / expected.abs().max()) for name, result in results.items()
    }
    print(elastic.report)
    for name, difference in differences.items():
        print(f"{name}: {difference:.1e} of the largest logit from the plain model")
    return differences


if __name__ == "__main__":
    main()
