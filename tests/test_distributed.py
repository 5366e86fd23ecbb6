"""Two gloo processes on CPU train as one does: DDP, FSDP2, sharded checkpoints, and what is written of a sharded model.

One pair of processes does everything and writes what it found; the tests compare it with this process.
"""

import contextlib
import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from nets import conv_net
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from t3c_compile.certificate import TrainingProxy
from t3c_compile.chain import Grid, chains
from t3c_compile.checkpoint import Checkpoint
from t3c_compile.controller import Controller
from t3c_compile.passes.elastic import elastic_layers
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.training import LossWeights, TrainError, TrainResult, train
from t3c_compile.transforming import transform

_STEPS, _ROWS = 5, 16
# Every term counts from the first step on.
_WEIGHTS = LossWeights(certificate=0.1, epsilon=0)
Batch = tuple[Tensor, Tensor]


def _model() -> tuple[ElasticGraphModule, tuple[Tensor]]:
    model, inputs = conv_net()
    return transform(model, inputs), inputs


def _batches(rank: int = 0, count: int = 1) -> list[Batch]:
    """The part of ``_STEPS`` batches that one of ``count`` processes has."""
    generator = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(_ROWS, 1, 8, 8, generator=generator), torch.randint(10, (_ROWS,), generator=generator))
        for _ in range(_STEPS)
    ]
    return [(x.chunk(count)[rank], y.chunk(count)[rank]) for x, y in batches]


class _Step(list):  # type: ignore[type-arg]
    """One batch an epoch, so that the history has every step; ``stop`` interrupts before that epoch."""

    def __init__(self, batches: list[Batch], stop: int | None = None) -> None:
        super().__init__(batches)
        self.epoch, self.stop = 0, stop

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Any]:
        if self.epoch == self.stop:
            raise KeyboardInterrupt
        self.epoch += 1
        return iter([self[self.epoch - 1]])


def _shard(elastic: ElasticGraphModule) -> ElasticGraphModule:
    for _, layer in elastic_layers(elastic):
        fully_shard(layer)
    fully_shard(elastic)
    return elastic


def _train(elastic: ElasticGraphModule, batches: _Step, shard: bool = False, **options: Any) -> TrainResult:
    controller = Controller(chains(elastic, Grid(8, (4, 6, 8))))
    proxy = TrainingProxy(elastic, [(x,) for x, _ in _batches()])
    if shard:
        _shard(elastic)
    options |= {"epochs": _STEPS, "controller": controller, "proxy": proxy, "weights": _WEIGHTS, "progress": False}
    return train(elastic, batches, **options)


def _found(elastic: ElasticGraphModule, result: TrainResult) -> dict[str, Any]:
    return {"history": result.history, "state": _whole(elastic), "controller": result.controller.state_dict()}


def _whole(elastic: ElasticGraphModule) -> dict[str, Tensor]:
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in elastic.state_dict().items()}


def _work(rank: int, folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    base, inputs = _model()
    own = _batches(rank, 2)

    elastic = copy.deepcopy(base)
    found["ddp"] = _found(elastic, _train(elastic, _Step(own)))

    elastic = copy.deepcopy(base)
    found["fsdp"] = _found(elastic, _train(elastic, _Step(own), shard=True))
    found["shard"] = sum(p.to_local().numel() for p in elastic.parameters())
    Checkpoint(elastic, inputs).save(folder / "whole.st")
    found["dense"] = elastic.to_dense()

    # Interrupted after 3 steps, and gone on from a sharded checkpoint.
    resume = folder / "resume"
    with contextlib.suppress(KeyboardInterrupt):
        _train(copy.deepcopy(base), _Step(own, stop=3), shard=True, checkpoint=resume)
    elastic = copy.deepcopy(base)
    again = _Step(own)
    again.epoch = 3
    found["resumed"] = _found(elastic, _train(elastic, again, shard=True, checkpoint=resume))
    try:
        _train(copy.deepcopy(base), _Step(own), checkpoint=resume)
    except TrainError as error:
        found["unsharded"] = str(error)
    try:
        train(copy.deepcopy(base), own[rank:], epochs=1, progress=False)
    except TrainError as error:
        found["uneven"] = str(error)

    # The user's own sharded save and load.
    dcp.save({"model": get_model_state_dict(elastic)}, checkpoint_id=folder / "dcp")
    other = _shard(copy.deepcopy(base))
    state = {"model": get_model_state_dict(other)}
    dcp.load(state, checkpoint_id=folder / "dcp")
    set_model_state_dict(other, state["model"])
    found["loaded"] = _whole(other)

    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """What two processes found, and the folder they wrote to."""
    folder = tmp_path_factory.mktemp("pair")
    mp.spawn(_work, (folder,), nprocs=2)
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """The same training in this process, on whole batches."""
    elastic, _ = _model()
    return _found(elastic, _train(elastic, _Step(_batches())))


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_have_the_losses_of_one(pair: Any, alone: dict[str, Any], way: str) -> None:
    """Every step's loss to 2e-5 relative: sums in another order, and activations that round to the next integer."""
    _, found = pair
    for rank in range(2):
        for ours, theirs in zip(found[rank][way]["history"], alone["history"], strict=True):
            # A step trains the full model, the least options or sampled ones, and has the terms of that.
            assert ours.keys() == theirs.keys()
            assert sum(ours.values()) == pytest.approx(sum(theirs.values()), rel=2e-5)
            for term in {"task", "certificate"} & ours.keys():
                assert ours[term] == pytest.approx(theirs[term], rel=2e-5)
    terms = {name: value for epoch in alone["history"] for name, value in epoch.items()}
    assert terms.keys() == {"task", "distillation", "budget", "certificate"}
    assert terms["certificate"] > 0
    assert _equal(found[0][way]["state"], found[1][way]["state"])
    assert _equal(found[0][way]["controller"], found[1][way]["controller"])


def test_ranges_follow_the_batches_of_both(pair: Any, alone: dict[str, Any]) -> None:
    """Activation ranges are those of whole batches: each half alone is narrower."""
    _, found = pair
    ours, theirs = found[0]["ddp"]["state"], alone["state"]
    names = [name for name in ours if name.endswith(("x_quant.low", "x_quant.high"))]
    assert names
    for name in names:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-3)


def test_each_process_holds_its_shard(pair: Any, alone: dict[str, Any]) -> None:
    _, found = pair
    whole = sum(tensor.numel() for tensor in _parameters(alone["state"]).values())
    assert [found[rank]["shard"] for rank in range(2)] == pytest.approx([whole / 2] * 2, rel=0.02)
    assert found[0]["shard"] + found[1]["shard"] == whole


def _parameters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = dict(_model()[0].named_parameters())
    return {name: tensor for name, tensor in state.items() if name in names}


def test_a_sharded_run_goes_on_exactly(pair: Any) -> None:
    """Interrupted after three steps, the certificate's power iteration included: equal to the bit."""
    folder, found = pair
    for rank in range(2):
        assert found[rank]["resumed"]["history"] == found[rank]["fsdp"]["history"]
        assert _equal(found[rank]["resumed"]["state"], found[rank]["fsdp"]["state"])
        assert _equal(found[rank]["resumed"]["controller"], found[rank]["fsdp"]["controller"])
    assert not list(folder.glob("*.tmp"))


def test_a_sharded_model_is_written_whole(pair: Any) -> None:
    """A t3c checkpoint and ``to_dense`` of a sharded model are those of the whole one."""
    folder, found = pair
    loaded = Checkpoint.load(folder / "whole.st").model
    assert _equal(loaded.state_dict(), found[0]["fsdp"]["state"])
    assert _equal(found[0]["dense"], loaded.to_dense())
    assert _equal(found[1]["dense"], found[0]["dense"])


def test_torchs_own_sharded_checkpoint(pair: Any) -> None:
    _, found = pair
    assert _equal(found[0]["loaded"], found[0]["resumed"]["state"])


def test_what_does_not_fit_is_refused_in_every_process(pair: Any) -> None:
    _, found = pair
    for rank in range(2):
        assert "is of a sharded run" in found[rank]["unsharded"]
        assert f"has {_STEPS - rank} batches and another one" in found[rank]["uneven"]


def test_the_example_under_torchrun(tmp_path: Path) -> None:
    """Two processes, started twice: rank 0 alone prints and writes, and the second start goes on from the first."""
    example = Path(__file__).resolve().parent.parent / "examples" / "train_distributed.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(example)]
    done = subprocess.run(
        [*command, "--fsdp", "-o", str(tmp_path / "m.safetensors")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 0") == 1
    assert Checkpoint.load(tmp_path / "m.safetensors").controller is not None
