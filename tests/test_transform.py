"""``transform``: equal outputs, and everything a module must survive."""

import copy
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from nets import NETS, conv_net, mlp
from torch import Tensor, nn

from t3c_compile.passes.elastic import elastic_layers
from t3c_compile.passes.errors import BadWeightsError, CaptureError, NothingToCompressError, T3CError
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.option import Option
from t3c_compile.transforming import Config, transform


def _elastic(name: str, **config: object) -> tuple[nn.Module, ElasticGraphModule, tuple[Tensor]]:
    model, inputs = NETS[name]()
    calibration = [(torch.randn(32, *inputs[0].shape[1:]),)]
    return model, transform(model, inputs, Config(**config), calibration=calibration), inputs  # type: ignore[arg-type]


def _profile(elastic: ElasticGraphModule, rank: int, bits: int) -> dict[str, Option]:
    return {
        name: Option(layer.form, 0 if layer.form == "dense" else min(rank, layer.max_rank), bits)
        for name, layer in elastic_layers(elastic)
    }


def _close(found: Tensor, expected: Tensor, rtol: float = 1e-4) -> None:
    assert float((found - expected).abs().max()) <= rtol * float(expected.abs().max())


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("conv", ["tucker2", "cp"])
def test_full_rank_equals_the_model(net: str, conv: str) -> None:
    """At full rank and 32 bits, in eval mode, at batch sizes the model was not captured with."""
    model, elastic, inputs = _elastic(net, conv=conv)
    assert not elastic.training
    for batch in (1, 2, 9):
        x = torch.randn(batch, *inputs[0].shape[1:]) * 3
        _close(elastic(x), model(x))


def test_training_graph_is_the_models_own() -> None:
    """Batch norm uses and updates batch statistics in train(), and dropout drops, as in the model."""
    model, inputs = conv_net()
    elastic = transform(model, inputs)
    for m in (model, elastic):
        m.train()
    x = torch.randn(32, 1, 8, 8) + 1
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    _close(elastic(x), expected)
    _close(elastic.get_buffer("norm2.running_mean"), model.norm2.running_mean)
    other = copy.deepcopy(elastic)
    assert not torch.equal(other(x), other(x))
    for m in (model, elastic):
        m.eval()
    _close(elastic(x), model(x))


def test_the_model_is_left_as_it_was() -> None:
    model, inputs = conv_net()
    model.train()
    model.norm1.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    elastic = transform(model, inputs).train()
    elastic(inputs[0] + 3).sum().backward()
    with torch.no_grad():
        for parameter in elastic.parameters():
            parameter.add_(parameter.grad)
    assert model.training
    assert not model.norm1.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_report_names_layers_and_reasons() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(20, 32)
            self.conv = nn.ConvTranspose1d(32, 32, 3, padding=1)
            self.parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))
            self.asked = nn.Linear(32, 32)
            self.elastic = nn.Linear(32, 64)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(self.table(x).transpose(1, 2)).transpose(1, 2)
            return self.elastic(self.asked(self.parametrized(x)))

    torch.manual_seed(0)
    model, x = Odd().eval(), torch.randint(0, 20, (3, 9))
    elastic = transform(model, (x,), Config(keep=("ask*",)))
    _close(elastic(x), model(x))
    kept = {name: record.reason for name, record in elastic.report.kept.items()}
    assert list(elastic.report.elastic) == ["elastic", "table"]
    assert set(kept) == {"conv", "parametrized", "asked"}
    assert "computed in the graph" in kept["parametrized"]
    assert "transposed convolution" in kept["conv"]
    assert "kept by request (pattern 'ask*')" in kept["asked"]
    assert "kept    conv: aten.conv_transpose1d" in str(elastic.report)


def test_packed_attention_projection_is_one_elastic_layer() -> None:
    _, elastic, _ = _elastic("attention")
    assert elastic.report.elastic["attention.in_proj"].shape == (96, 32)


@pytest.mark.parametrize("net", NETS)
def test_copy_save_load_and_state_dict(net: str, tmp_path: Path) -> None:
    _, elastic, inputs = _elastic(net)
    elastic.set_options(_profile(elastic, 8, 6))
    x = torch.randn(3, *inputs[0].shape[1:])
    expected = elastic(x)

    copied = copy.deepcopy(elastic)
    assert torch.equal(copied(x), expected)
    with torch.no_grad():
        next(copied.parameters()).mul_(2)
    assert torch.equal(elastic(x), expected)

    torch.save(elastic, tmp_path / "elastic.pt")
    loaded = torch.load(tmp_path / "elastic.pt", weights_only=False)
    assert torch.equal(loaded(x), expected)
    assert loaded.train().training
    assert loaded(x).requires_grad
    assert str(loaded.report) == str(elastic.report)

    _, other, _ = _elastic(net)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    result = other.load_state_dict(elastic.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(other(x), expected)


@pytest.mark.parametrize("net", NETS)
def test_reexports_with_a_free_batch(net: str) -> None:
    _, elastic, inputs = _elastic(net)
    elastic.set_options(_profile(elastic, 8, 4))
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(elastic, inputs, dynamic_shapes=shapes)
    x = torch.randn(11, *inputs[0].shape[1:])
    assert torch.allclose(program.module()(x), elastic(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("net", NETS)
def test_one_compiled_graph_serves_every_rank(net: str) -> None:
    """``torch.compile`` compiles once; other ranks and widths run without compiling again, with the eager gradients."""
    from torch._dynamo.testing import CompileCounterWithBackend

    _, elastic, inputs = _elastic(net)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(elastic, backend=counter, dynamic=False)
    for rank, bits in ((8, 4), (16, 8), (8, 6), (4, 32)):
        elastic.set_options(_profile(elastic, rank, bits))
        outputs, gradients = [], []
        for run in (elastic, compiled):
            elastic.zero_grad()
            outputs.append(run(*inputs))
            outputs[-1].square().sum().backward()
            gradients.append({name: p.grad.clone() for name, p in elastic.named_parameters() if p.grad is not None})
        assert torch.allclose(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
        assert gradients[0].keys() == gradients[1].keys()
        assert len(gradients[0]) == len(list(elastic.parameters()))
        for name, gradient in gradients[0].items():
            assert torch.allclose(gradients[1][name], gradient, rtol=1e-4, atol=1e-6), name
    assert counter.frame_count == 1


def _ddp_worker(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    elastic, x, y = torch.load(f"{folder}/in.pt", weights_only=False)
    model = nn.parallel.DistributedDataParallel(elastic)
    F.cross_entropy(model(x.chunk(2)[rank]), y.chunk(2)[rank]).backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in elastic.named_parameters()}, f"{folder}/out.pt")
    # Without it one process may go while the other's threads still talk to it.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_ddp_over_two_processes_gives_one_processs_gradients(tmp_path: Path) -> None:
    """A profile's step over two gloo processes; gradients equal one process's to 1e-4 of the largest."""
    model, inputs = mlp()
    elastic = transform(model, inputs)
    elastic.set_options(_profile(elastic, 16, 6))
    x, y = torch.randn(16, 64), torch.randint(0, 10, (16,))
    torch.save((elastic, x, y), tmp_path / "in.pt")
    torch.multiprocessing.spawn(_ddp_worker, (str(tmp_path),), nprocs=2)
    F.cross_entropy(elastic(x), y).backward()
    found = torch.load(tmp_path / "out.pt")
    for name, parameter in elastic.named_parameters():
        assert parameter.grad is not None
        _close(found[name], parameter.grad)


class _Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum().item() > 0:
            return self.layer(x)
        return x


def test_a_model_that_cannot_be_exported_is_refused_with_reason_and_line() -> None:
    with pytest.raises(CaptureError, match=r"(?s)torch.export cannot capture.*test_transform.py:\d+: if x.sum"):
        transform(_Branches(), (torch.randn(2, 8),))


def test_bad_inputs_are_refused_before_any_work() -> None:
    model, (x,) = mlp()
    with pytest.raises(CaptureError, match=r"does not run on the example inputs \(\(5, 63\) torch.float32\)"):
        transform(model, (x[:, :63],))
    with pytest.raises(CaptureError, match=r"\(5, 64\) torch.int64"):
        transform(model, (x.long(),))
    with pytest.raises(CaptureError, match="must be a tuple"):
        transform(model, x)  # type: ignore[arg-type]
    with torch.no_grad():
        model.second.weight[0, 0] = float("nan")
    with pytest.raises(BadWeightsError, match=r"'second\.weight' holds NaN"):
        transform(model, (x,))


def test_nothing_to_compress_is_refused_with_the_reasons() -> None:
    class Bilinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = nn.Bilinear(5, 4, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.pair(x, y)

    with pytest.raises(NothingToCompressError, match=r"nothing to compress.*pair \(aten.bilinear\)"):
        transform(Bilinear(), (torch.randn(2, 5), torch.randn(2, 4)))


def test_config_round_trips_and_refuses_the_unknown() -> None:
    config = Config(conv="cp", keep=("a*",))
    assert Config.from_json(config.to_json()) == config
    with pytest.raises(T3CError, match="only version 1"):
        Config.from_json({**config.to_json(), "version": 2})
    with pytest.raises(T3CError, match="unknown fields shape"):
        Config.from_json({**config.to_json(), "shape": 2})
