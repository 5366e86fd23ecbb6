"""An artifact of kernels on smmla: right where the CPU has it, refused where it has not."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from nets import mlp

from t3c_compile import snapping
from t3c_compile.artifact import lower
from t3c_compile.backends.targets import get_target
from t3c_compile.passes.specialize import specialize
from t3c_compile.transforming import transform

LOAD = "import sys, t3c_compile; t3c_compile.load(sys.argv[1])"


def test_artifact_for_neoverse_v2(arm64: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = mlp()
    elastic = transform(model, inputs)
    targets = [get_target("neoverse-v2")]
    torch.manual_seed(0)
    # Of an untrained network on noise hardly a profile is better than another: keep them all.
    monkeypatch.setattr(snapping, "drop_dominated", lambda profiles: (profiles, []))
    profiles = snapping.snap(elastic, [(torch.randn(64, 64),)], targets, count=2)
    artifact = lower(elastic, profiles, targets, tmp_path / "net.t3c", inputs)

    x, ranks = torch.randn(9, 64), profiles.store_ranks()
    found = arm64.run_profiles(artifact, "neoverse-v2", x.numpy())
    assert list(found) == [profile.name for profile in profiles.profiles]
    for profile in profiles.profiles:
        with torch.no_grad():
            expected = specialize(elastic, profile.options, profile.activations, ranks)(x)
        torch.testing.assert_close(torch.from_numpy(found[profile.name][0]), expected, rtol=1e-5, atol=1e-5)

    refused = arm64.run_python(["-c", LOAD, str(artifact)], cpu="cortex-a76")
    assert refused.returncode != 0
    assert "net.t3c runs here: neoverse-v2: this CPU lacks sve, sve2, i8mm, bf16" in refused.stderr
