"""What an NPU runs of attention, and of products whose results are to be exact: the parts give the reference's bits."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from ethosu_nets import profile_graphs, settled
from torch import Tensor, fx, nn

from t3c_compile.backends.ethosu.attention import take_attention_apart
from t3c_compile.backends.ethosu.host import split_profile
from t3c_compile.backends.targets import get_target
from t3c_compile.backends.tvm.build import build_library
from t3c_compile.passes.infer_values import InputSpec, infer_values
from t3c_compile.virtual_machine import VirtualMachine

t3c = torch.ops.t3c


def attention_graph(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> tuple[fx.GraphModule, Any]:
    """``t3c::attention_int8`` alone, and its inputs."""
    inputs = (query, key, torch.randn(key.shape)) + (() if mask is None else (mask,))
    graph = fx.Graph()
    places = [graph.placeholder(name) for name in ("query", "key", "value", "mask")[: len(inputs)]]
    arguments = (*places[:3], places[3] if mask is not None else None, causal, 0.25)
    graph.output(graph.call_function(t3c.attention_int8.default, arguments))
    gm = fx.GraphModule(nn.Module(), graph)
    infer_values(gm, tuple(InputSpec(tuple(x.shape), x.dtype) for x in inputs))
    return gm, inputs


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, "bool"])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_attention_taken_apart_is_the_reference(causal: bool, mask: str | None, groups: int) -> None:
    torch.manual_seed(groups)
    some = None if mask is None else torch.rand(1, 1, 7, 9) > 0.3
    gm, inputs = attention_graph(torch.randn(1, 4, 7, 32), torch.randn(1, groups, 9, 32), some, causal)
    expected = gm(*inputs)
    take_attention_apart(gm)
    gm.recompile()
    targets = [str(node.target) for node in gm.graph.nodes]
    assert targets.count("t3c.matmul_int8.default") == 2
    assert "t3c.attention_int8.default" not in targets
    assert torch.equal(gm(*inputs), expected)


def test_attention_with_a_mask_that_is_added_stays_whole() -> None:
    gm, inputs = attention_graph(torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16), torch.randn(1, 1, 5, 5), False)
    split = split_profile(gm, inputs)
    assert not split.programs
    assert "mask is added in float32" in {f.op: f.reason for f in split.fallbacks}["attention_int8"]


class Rows(nn.Module):
    """The host's parts that no other profile has."""

    def forward(self, x: Tensor, scores: Tensor, images: Tensor, gain: Tensor, bias: Tensor) -> list[Tensor]:
        whole, step = t3c.integer_rows(x)
        e, inverse = t3c.exponentials(scores)
        channels = gain[:, None, None], bias[:, None, None]
        return [whole, step, e, inverse, t3c.affine(x, gain, bias), t3c.affine(images, *channels)]


@pytest.mark.parametrize("target", ["x86_64", "x86_64-v3"])
@pytest.mark.parametrize("count", [5, 32, 51])
def test_kernels_of_the_host_are_the_reference(target: str, count: int, tmp_path: Path) -> None:
    torch.manual_seed(count)
    x, scores = torch.randn(3, 4, count) * 10, torch.randn(2, 3, count) * 30
    x[0, 1], x[0, 2], scores[1, 0], scores[1, 1, :2] = 0.0, 1e-36, -torch.inf, -torch.inf
    inputs = x, scores, torch.randn(2, count, 3, 5), torch.randn(count), torch.randn(count)
    module = Rows()
    program = torch.export.export(module, inputs, strict=False)
    library = build_library({"main": program}, get_target(target), tmp_path / "rows.so")
    machine = VirtualMachine(library.path, {})
    found = machine.array(machine["main"](*(machine.tensor(x.numpy()) for x in inputs), machine.tuple([])))
    for expected, result in zip(module(*inputs), found, strict=True):
        assert result.dtype == expected.numpy().dtype
        assert torch.equal(torch.from_numpy(result), expected)


class Forms(nn.Module):
    """A layer of every form that convolutions and linear layers are deployed in."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, 2, 1)
        self.norm = nn.BatchNorm2d(32)
        self.middle = nn.Conv2d(32, 48, 3, padding=1)
        self.depthwise = nn.Conv2d(48, 48, 3, 1, 2, 2, groups=48, bias=False)
        self.pointwise = nn.Conv2d(48, 64, 1, 2, bias=False)
        self.after = nn.BatchNorm2d(64)
        self.hidden = nn.Linear(64, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = nn.functional.hardswish(self.depthwise(self.middle(x)))
        x = torch.relu(self.after(self.pointwise(x)))
        return self.head(nn.functional.gelu(self.hidden(x.mean((2, 3)))))


@pytest.mark.parametrize("conv", ["tucker2", "cp"])
def test_exact_products_are_the_reference(conv: str) -> None:
    """In every profile; and without exactness they are not, so that this can fail."""
    torch.manual_seed(0)
    x = torch.randn(16, 3, 20, 18)
    graphs = profile_graphs(settled(Forms(), x), x, count=2, conv=conv)
    ops: set[str] = set()
    for graph in graphs:
        ops |= {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
        with torch.no_grad():
            expected = graph(x)
            exact, fused = (split_profile(copy.deepcopy(graph), (x[:1],), exact) for exact in (True, False))
            assert torch.equal(torch.cat([exact.host(image) for image in x.split(1)]), expected)
            assert not torch.equal(torch.cat([fused.host(image) for image in x.split(1)]), expected)
        assert exact.npu_macs == exact.macs == fused.macs
        assert "only multiplies and sums" in {f.op: f.reason for f in exact.fallbacks}["hardswish"]
    forms = {f"t3c.{name}.default" for name in (f"{conv}_conv2d", "svd_conv2d", "int8_conv2d", "svd_linear")}
    assert forms <= ops
