"""Times of layers' kernels: what is measured is what runs, once, and no layer is slower in factors than dense."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nets import NETS
from torch import nn

from t3c_compile.artifact import export_profiles
from t3c_compile.backends.targets import get_target
from t3c_compile.backends.tvm.kernels.isa import isa_for
from t3c_compile.backends.tvm.tuning.collect import workloads_of
from t3c_compile.backends.tvm.tuning.runner import Runner
from t3c_compile.chain import chains
from t3c_compile.cost import LayerTimes
from t3c_compile.kernel_times import kernel_times, layer_workloads
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.option import Option
from t3c_compile.snapping import grid_of, snap
from t3c_compile.transforming import transform

# This machine, with one grid whatever it is.
TARGET = replace(get_target("x86_64"), rank_multiple=16, bits=(4, 6, 8))


def _two_layers() -> tuple[ElasticGraphModule, list[tuple[torch.Tensor]]]:
    torch.manual_seed(0)
    calibration = [(torch.randn(64, 192),)]
    model = nn.Sequential(nn.Linear(192, 192), nn.ReLU(), nn.Linear(192, 192))
    return transform(model, calibration[0]), calibration


def test_times_between_measured_ranks() -> None:
    times = LayerTimes(3.0, (8, 16, 32), (1.0, 0.5, 6.0))
    assert [times.at(rank) for rank in (0, 8, 12, 16, 24, 32)] == [3.0, 0.5, 0.5, 0.5, 3.25, 6.0]
    assert [times.pays(rank) for rank in (8, 16, 24, 32)] == [True, True, False, False]


@pytest.mark.parametrize("net", NETS)
def test_measured_is_what_lowering_calls(net: str) -> None:
    model, inputs = NETS[net]()
    elastic = transform(model, inputs)
    profiles = snap(elastic, [(torch.randn(64, *inputs[0].shape[1:]),)], [TARGET], count=1)
    ranks = {name: option.rank for name, option in profiles.profiles[0].options.items()}
    found = layer_workloads(elastic, isa_for(TARGET), inputs, {name: [rank] for name, rank in ranks.items()})
    measured = {workload.key for by_rank in found.values() for calls in by_rank.values() for workload in calls}
    programs, _ = export_profiles(elastic, profiles, inputs, lambda: None)
    assert {workload.key for workload in workloads_of(programs, isa_for(TARGET))} == measured


def test_a_layer_is_never_slower_in_factors_than_dense() -> None:
    elastic, calibration = _two_layers()
    ranks = (16, 80)
    assert {chain[-1].rank for chain in chains(elastic, grid_of([TARGET])).values()} == {80}
    times = {"0": LayerTimes(2.0, ranks, (1.0, 2.5)), "2": LayerTimes(1.0, ranks, (1.0, 3.0))}
    profiles = snap(elastic, calibration, [TARGET], count=6, times={TARGET.name: times}).profiles
    assert {profile.options["2"].form for profile in profiles} == {"dense"}
    # 48 takes 1.75 ms, 64 takes 2.125.
    assert profiles[-1].options["0"] == Option("svd", 48, 8)
    for profile in profiles:
        known = profile.costs[TARGET.name]
        assert known["source"] == "sum of the layers' kernels, measured"
        assert known["latency_ms"] == pytest.approx(1.0 + times["0"].at(profile.options["0"].rank))


def test_what_was_measured_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elastic, (inputs,) = _two_layers()
    records = tmp_path / "records.jsonl"
    found = kernel_times(elastic, grid_of([TARGET]), TARGET, records, inputs)
    assert all(times.ranks == (16, 32, 48, 64, 80) for times in found.values())
    assert all(min(times.dense, *times.factorized) > 0 for times in found.values())
    assert found["0"] == found["2"]  # one shape, one measurement
    measured = records.read_bytes()

    def refuse(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(Runner, "measure", refuse)
    assert kernel_times(elastic, grid_of([TARGET]), TARGET, records, inputs) == found
    assert records.read_bytes() == measured
