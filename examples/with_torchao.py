"""torchao's quantization before and after ours: `python examples/with_torchao.py`.

Before: layers that torchao has quantized are kept as they are, the report says so, and the others become elastic.
After: layers that were kept in float32 are quantized by torchao in the deployed graph.
"""

import copy
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_

import t3c_compile as t3c
from t3c_compile.passes.elastic import elastic_layers
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.option import Option
from t3c_compile.passes.specialize import specialize
from t3c_compile.transforming import observe


class Net(nn.Module):
    """[N, 32] to [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(x)))))


def deployed(elastic: ElasticGraphModule) -> GraphModule:
    """An elastic model at full rank and 8 bits."""
    observe(elastic, [(torch.randn(1024, 32),)])
    return specialize(elastic, {name: Option(layer.form, layer.max_rank, 8) for name, layer in elastic_layers(elastic)})


def quantize_first(model: nn.Module, x: Tensor) -> tuple[ElasticGraphModule, GraphModule]:
    """torchao takes ``first``, we take the others."""
    quantized = copy.deepcopy(model)
    quantize_(quantized, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name == "first")
    elastic = t3c.transform(quantized, (x,)).eval()
    return elastic, deployed(elastic)


def quantize_afterwards(model: nn.Module, x: Tensor) -> GraphModule:
    """We take ``second``, torchao the others, in the deployed graph."""
    elastic = t3c.transform(model, (x,), t3c.Config(keep=("first", "head"))).eval()
    graph = deployed(elastic)
    kept = OrderedDict((f"{layer}.weight", Int8WeightOnlyConfig()) for layer in ("first", "head"))
    quantize_(graph, FqnToConfig(kept), filter_fn=None)
    # torchao's tensors know the function, which an exported graph calls by its ATen name.
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        node.target = F.linear
    graph.recompile()
    return graph


def main() -> dict[str, float]:
    """Largest difference from the plain model over its largest logit, by what was done."""
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(16, 32)
    expected = model(x)
    elastic, before = quantize_first(model, x)
    after = quantize_afterwards(model, x)
    print(elastic.report)
    print({name: type(tensor).__name__ for name, tensor in after.state_dict().items() if "weight" in name})
    results = {"elastic": elastic(x), "before": before(x), "after": after(x)}
    differences = {
        name: float((result - expected).abs().max() / expected.abs().max()) for name, result in results.items()
    }
    for name, difference in differences.items():
        print(f"{name}: {difference:.4f} of the largest logit from the plain model")
    return differences


if __name__ == "__main__":
    main()
