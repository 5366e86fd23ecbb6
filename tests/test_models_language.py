"""Language models through the whole pipeline, in small configurations: batch and length free, padded inputs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from torch import Tensor, nn
from torch.export import Dim
from tvm.runtime import vm as runtime

pytest.importorskip("transformers")

from nets import packed

import t3c_compile
from examples import decode_llama
from examples.models.language import MODELS, transformers
from t3c_compile.artifact import export_profiles, lower
from t3c_compile.backends.targets import get_target
from t3c_compile.backends.tvm.build import build_library
from t3c_compile.passes.capture import capture
from t3c_compile.passes.errors import CaptureError
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.specialize import specialize
from t3c_compile.profile import ProfileSet
from t3c_compile.snapping import snap
from t3c_compile.transforming import transform

# The model that is compiled for arm64 too.
_ARM64 = "distilbert"


class Built:
    """A small model: transformed, trained for one step, snapped, and its greatest profile lowered."""

    def __init__(self, name: str, folder: Path) -> None:
        builder = MODELS[name]
        model, inputs = builder.build(True), builder.inputs(True)
        self.others = builder.other_inputs(True)
        self.elastic = transform(model, inputs, dynamic_shapes=builder.dynamic_shapes(True))
        with torch.no_grad():
            self.full_rank = (model(*self.others), self.elastic(*self.others))
        self.losses = _train(self.elastic, builder.loss, inputs)
        targets = [get_target(target) for target in ("x86_64", *(["arm64"] if name == _ARM64 else []))]
        found = snap(self.elastic, [inputs], targets, count=2)
        self.profiles = ProfileSet(found.profiles[-1:], found.order)
        self.path = lower(self.elastic, self.profiles, targets, folder / f"{name}.t3c", inputs)

    def reference(self, *inputs: Tensor) -> Any:
        (profile,) = self.profiles.profiles
        with torch.no_grad():
            return specialize(self.elastic, profile.options, profile.activations)(*inputs).numpy()


def _train(elastic: ElasticGraphModule, loss: Callable[[Any], Tensor], inputs: tuple[Tensor, ...]) -> list[float]:
    """The loss of one batch before and after a step on it; every elastic layer must have moved."""
    elastic.train()
    before = {name: parameter.detach().clone() for name, parameter in elastic.named_parameters()}
    optimizer = torch.optim.SGD(elastic.parameters(), lr=1e-2)
    found = loss(elastic(*inputs))
    found.backward()
    optimizer.step()
    still = [n for n, p in elastic.named_parameters() if n.endswith((".U", ".V")) and torch.equal(p, before[n])]
    assert not still, still
    elastic.eval()
    with torch.no_grad():
        return [float(found), float(loss(elastic(*inputs)))]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    folder, done = tmp_path_factory.mktemp("language"), dict[str, Built]()

    def get(name: str) -> Built:
        if name not in done:
            done[name] = Built(name, folder)
        return done[name]

    return get


# BERT and RoBERTa have the layers of DistilBERT.
@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("bert_base", "roberta_base")])
def test_the_whole_pipeline(built: Callable[[str], Built], name: str) -> None:
    """The lowered model gives the specialized torch graph's logits, at batches and lengths it was not captured with."""
    model = built(name)
    plain, elastic = model.full_rank
    assert (plain - elastic).abs().max() <= 1e-4 * plain.abs().max()
    assert np.isfinite(model.losses).all()
    session = t3c_compile.load(model.path)
    ids, mask = model.others
    for inputs in ((ids, mask), (ids[:1, :5], mask[:1, :5])):
        found, expected = session.run(*(x.numpy() for x in inputs)), model.reference(*inputs)
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()


def test_padding_changes_nothing(built: Callable[[str], Built]) -> None:
    """Through the artifact: logits of real tokens do not depend on what stands where the mask is 0."""
    model = built(_ARM64)
    session = t3c_compile.load(model.path)
    ids, mask = (x.numpy() for x in model.others)
    noise = np.where(mask == 1, ids, 7)
    first, second = session.run(ids, mask), session.run(noise, mask)
    assert np.array_equal(first[mask == 1], second[mask == 1])
    assert not np.array_equal(ids, noise)


def test_arm64_agrees_with_torch(built: Callable[[str], Built], arm64: Any, tmp_path: Path) -> None:
    model = built(_ARM64)
    ids, mask = model.others
    np.savez(tmp_path / "in.npz", ids=ids.numpy(), mask=mask.numpy())
    code = (
        "import sys, numpy, t3c_compile; s = t3c_compile.load(sys.argv[1]); a = numpy.load(sys.argv[2])\n"
        "assert s.target == 'arm64'; numpy.save(sys.argv[3], s.run(a['ids'], a['mask']))"
    )
    done = arm64.run_python(["-c", code, str(model.path), str(tmp_path / "in.npz"), str(tmp_path / "out.npy")])
    assert done.returncode == 0, done.stderr
    found, expected = np.load(tmp_path / "out.npy"), model.reference(ids, mask)
    assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()


def test_decoding_with_a_cache_gives_torchs_tokens(tmp_path: Path) -> None:
    """32 greedy tokens of 3 prompts: in float32 those of ``transformers``' own generation; in int8 those of the
    specialized graph in torch."""
    decoder, length = decode_llama.build(True), 48
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(2, 160, (1, tokens), generator=generator) for tokens in (5, 9, 3)]
    inputs = decode_llama.inputs(decoder, torch.randint(2, 160, (2, 7), generator=generator), length)
    elastic = transform(decoder, inputs, dynamic_shapes=decode_llama.dynamic_shapes(decoder, length)).eval()
    found = snap(elastic, [inputs], [get_target("x86_64")], count=2, full_model=True)
    profiles = ProfileSet(found.profiles[-2:], found.order)
    session = t3c_compile.load(lower(elastic, profiles, ["x86_64"], tmp_path / "llama.t3c", inputs))
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_without_attention(decoder.model.config)))
    plain.load_state_dict(decoder.model.state_dict())
    programs, store = export_profiles(elastic, profiles, inputs)
    for program in programs.values():
        assert all(t.data_ptr() == store[name].data_ptr() for name, t in program.state_dict.items())
    low, full = profiles.profiles
    assert {option.bits for option in full.options.values()} == {32}
    int8 = specialize(elastic, low.options, low.activations, profiles.store_ranks())
    with torch.no_grad():
        for prompt in prompts:
            first = decode_llama.inputs(decoder, prompt, length)
            arrays = [x.numpy() for x in first]
            session.set_profile(full.name)
            tokens = plain.eval().generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=32, pad_token_id=0
            )
            assert np.array_equal(decode_llama.generate(session.run, arrays, 32), tokens[:, prompt.shape[1] :].numpy())
            session.set_profile(low.name)
            assert np.array_equal(
                decode_llama.generate(session.run, arrays, 32), decode_llama.generate(int8, first, 32)
            )


def _without_attention(config: Any) -> dict[str, Any]:
    return {k: v for k, v in config.to_dict().items() if "attn_implementation" not in k} | {"eos_token_id": None}


class _Moves(nn.Module):
    """Parts of an axis with symbolic ends, running sums, rows written by index, and extremes along axes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(40.0).reshape(1, 20, 2))

    def forward(self, x: Tensor, at: Tensor) -> tuple[Tensor, ...]:
        tokens = x.shape[1]
        sums = torch.cumsum((x > 0).int(), 1), torch.cumsum(x, 0), x.cumsum(2)
        parts = self.table[:, :tokens] + x, self.table[:, 20 - tokens :], x[:, 1:], x[:, :-1], x[:, -2:], x[..., 1:]
        rows = at + torch.arange(tokens)
        return (
            *sums,
            *parts,
            self.table.expand(x.shape[0], 20, 2).index_copy(1, rows, x),
            x[:, :, 0].index_copy(1, at, x[:, :1, 1]),
            x.amax(1),
            x.amin((-1, 0), keepdim=True),
            x.amax(),
            *x.max(1),
            x.min(-1, keepdim=True).values,
        )


def test_parts_sums_rows_written_and_extremes_lower(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _Moves()
    shapes = ({0: Dim("batch", max=64), 1: Dim("tokens", min=3, max=18)}, {})
    program = torch.export.export(model, (torch.randn(2, 5, 2), torch.tensor([1])), dynamic_shapes=shapes)
    library = build_library({"main_0": program}, get_target("x86_64"), tmp_path / "moves.so")
    machine = runtime.VirtualMachine(tvm.runtime.load_module(str(library.path)), tvm.cpu())
    tensors = packed(machine, library, program.state_dict | program.constants)
    for batch, tokens, at in ((1, 3, 0), (3, 9, 2), (2, 18, 1)):
        x = torch.randn(batch, tokens, 2)
        found = machine["main_0"](*(tvm.runtime.tensor(v) for v in (x.numpy(), np.array([at]))), tensors)
        for ours, theirs in zip(found, model(x, torch.tensor([at])), strict=True):
            np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-6, atol=1e-6)


class _Projection(nn.Module):
    """Of such a size that one row of it is less work than two threads are woken for, and two rows are more."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(2048, 256, bias=False)
        self.register_buffer("weight", torch.randint(-119, 120, (256, 2048), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(256) * 1e-3)

    def forward(self, x: Tensor) -> Tensor:
        q = torch.ops.t3c.quantize_int8(x, 0.03, 4)
        return self.projection(x) + torch.ops.t3c.int8_linear(q, self.weight, self.scale, None, 0.03, 4, 8)


def test_products_serial_for_one_row_alone_lower(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _Projection()
    shapes = ({0: Dim("batch", max=64), 1: Dim("tokens", max=64)},)
    program = torch.export.export(model, (torch.randn(2, 3, 2048),), dynamic_shapes=shapes)
    library = build_library({"main_0": program}, get_target("x86_64"), tmp_path / "projection.so")
    machine = runtime.VirtualMachine(tvm.runtime.load_module(str(library.path)), tvm.cpu())
    state = model.state_dict()
    tensors = packed(machine, library, state)
    for batch, tokens in ((1, 1), (3, 5)):
        x = torch.randn(batch, tokens, 2048)
        found = machine["main_0"](tvm.runtime.tensor(x.numpy()), tensors).numpy()
        np.testing.assert_allclose(found, model(x).detach().numpy(), rtol=1e-4, atol=1e-4)


class _Regions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            fixed = self.first(x) * self.second(x)
        with torch.autocast("cpu", enabled=False):
            y = self.second(x)
        return y.exp() + fixed


def test_regions_without_gradients_keep_their_gradients() -> None:
    torch.manual_seed(0)
    model, x = _Regions(), torch.randn(3, 8)
    captured = capture(model, (x,)).train()
    found = {}
    for module in (model, captured):
        module(x).square().sum().backward()
        found[module] = {name: parameter.grad for name, parameter in module.named_parameters()}
    for name, expected in found[model].items():
        got = found[captured][name]
        assert (got is None) == (expected is None), name
        assert expected is None or torch.allclose(got, expected, rtol=1e-6), name


class _Autocast(_Regions):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.first(x)


def test_autocast_in_forward_is_refused() -> None:
    with pytest.raises(CaptureError, match="turns on autocast"):
        capture(_Autocast(), (torch.randn(3, 8),))
