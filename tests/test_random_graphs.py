"""Random modules survive every pass: right results or a reason, never a crash.

``T3C_FUZZ_CASES`` sets how many (20), ``T3C_FUZZ_SEED`` which (drawn and printed when not given).
"""

import copy
import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, seed, settings, strategies
from random_graphs import Case, cases
from torch import Tensor

import t3c_compile
from t3c_compile.backends.targets import get_target
from t3c_compile.passes.elastic import elastic_layers
from t3c_compile.passes.errors import T3CError
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.option import Option
from t3c_compile.passes.specialize import specialize
from t3c_compile.transforming import observe, transform

CASES = int(os.environ.get("T3C_FUZZ_CASES", "20"))
SEED = int(os.environ.get("T3C_FUZZ_SEED", str(random.SystemRandom().randrange(2**32))))
_OPTIONS = settings(
    deadline=None,
    print_blob=True,
    report_multiple_bugs=False,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)

counts: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def _show_counts(request: pytest.FixtureRequest) -> Iterator[None]:
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        # Ahead, for a case that ends the process.
        print(f"\nrandom graphs, T3C_FUZZ_SEED={SEED}", flush=True)
    yield
    with capture.global_and_fixture_disabled():
        print(f"\nrandom graphs, T3C_FUZZ_SEED={SEED}:")
        for what, times in counts.most_common():
            print(f"  {times:5d}  {what}")


def _elastic(case: Case) -> ElasticGraphModule | None:
    """The elastic model, or None for a refusal, which is counted with its reason."""
    note(f"T3C_FUZZ_SEED={SEED}\n{case}")
    try:
        elastic = transform(case.model, case.inputs)
    except T3CError as error:
        counts[f"refused: {type(error).__name__}: {str(error).splitlines()[0][:100]}"] += 1
        return None
    counts["transformed"] += 1
    for record in elastic.report.kept.values():
        counts[f"kept {record.op}: {re.sub(r'[^ ]+[.]weight', 'W', record.reason)}"] += 1
    return elastic


def _near(found: Tensor, case: Case, inputs: tuple[Tensor, ...], rtol: float = 1e-4) -> None:
    """Within ``rtol`` of the greatest output, or of what float32 itself costs this module if that is more."""
    expected = case.model(*inputs).detach()
    exact = copy.deepcopy(case.model).double()(*(x.double() if x.is_floating_point() else x for x in inputs))
    noise = float((exact - expected).abs().max())
    allowed = rtol * float(expected.abs().max()) + 30 * noise + 1e-6
    assert torch.isfinite(found).all()
    assert float((found - expected).abs().max()) <= allowed


def _random_profile(elastic: ElasticGraphModule, draw: random.Random) -> dict[str, Option]:
    return {
        name: Option(
            layer.form, 0 if layer.form == "dense" else draw.randint(1, layer.max_rank), draw.choice((4, 5, 6, 8))
        )
        for name, layer in elastic_layers(elastic)
    }


@seed(SEED)
@settings(_OPTIONS, max_examples=CASES)
@given(case=cases(), exports=strategies.sampled_from((False, False, True)))
def test_transform_specialize_and_export(case: Case, exports: bool) -> None:
    """Equal at full rank and another batch size, trains, and a random profile is a graph (of which one in three is
    exported again, for time)."""
    elastic = _elastic(case)
    if elastic is None:
        return
    _near(elastic(*case.inputs), case, case.inputs)
    if elastic.meta["t3c_batch_is_free"]:
        _near(elastic(*case.others), case, case.others)
    elastic.train()
    elastic(*case.inputs).square().mean().backward()
    for name, parameter in elastic.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name
    elastic.eval()
    options = _random_profile(elastic, random.Random(SEED))
    elastic.set_options(options)
    observe(elastic, [case.inputs])
    trained = elastic(*case.inputs)
    graph = specialize(elastic, options)
    deployed = graph(*case.inputs)
    assert torch.isfinite(deployed).all()
    # Rounding ties aside, the deployed graph computes what training saw.
    assert float((deployed - trained).norm()) <= 0.05 * float(trained.norm()) + 1e-5
    if not exports:
        return
    exported = torch.export.export(graph, case.inputs, strict=False).module()
    assert torch.equal(exported(*case.inputs), deployed)


@seed(SEED)
@settings(_OPTIONS, max_examples=max(1, CASES // 100), phases=[Phase.generate])
@given(case=cases())
def test_lower(case: Case, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Two profiles, compiled for this machine, compute what their graphs compute in torch."""
    elastic = _elastic(case)
    if elastic is None:
        return
    profiles = t3c_compile.snap(elastic, [case.inputs], [get_target("x86_64")], count=2)
    folder: Path = tmp_path_factory.mktemp("fuzz")
    try:
        t3c_compile.lower(elastic, profiles, [get_target("x86_64")], folder / "m.t3c", case.inputs)
    except T3CError as error:
        counts[f"not lowered: {type(error).__name__}: {str(error).splitlines()[0][:100]}"] += 1
        return
    counts["lowered"] += 1
    session = t3c_compile.load(folder / "m.t3c")
    for profile in profiles.profiles:
        session.set_profile(profile.name)
        graph = specialize(elastic, profile.options, profile.activations, profiles.store_ranks())
        expected = graph(*case.inputs)
        found = session.run(*(x.numpy() for x in case.inputs))
        difference = float((torch.from_numpy(found) - expected).norm())
        assert difference <= 0.02 * float(expected.norm()) + 1e-5
