"""Export a network's profiles as ONNX files that share their weights, run each in ONNX Runtime, and read one ONNX file.

    python examples/export_onnx.py

Takes a few seconds; weights are random, so the errors are those of a network that has learnt nothing.
"""

import tempfile
from pathlib import Path

import onnxruntime
import torch
from torch import nn

import t3c_compile as t3c
from t3c_compile.backends.onnx import export_onnx
from t3c_compile.backends.targets import get_target
from t3c_compile.onnx_import import load_onnx


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    ).eval()
    batches = [(torch.randn(32, 1, 8, 8),) for _ in range(2)]
    x = batches[0][0][:5]

    with tempfile.TemporaryDirectory() as folder:
        # A model may come from an ONNX file; the batch is free in what is made of it.
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model, (x,), path, dynamic_shapes=({0: "batch"},), verbose=False)
        elastic = t3c.transform(load_onnx(path), (x,), calibration=batches)
        profiles = t3c.snap(elastic, batches, [get_target("x86_64")], count=4).profiles

        exported = export_onnx(elastic, profiles, Path(folder) / "profiles", (x,))
        weights = (exported / "weights.data").stat().st_size
        print(f"{len(profiles)} profiles over {weights / 1e3:.1f} kB of weights")
        float_logits = model(x)
        for profile in profiles:
            session = onnxruntime.InferenceSession(str(exported / f"{profile.name}.onnx"))
            (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            drift = (torch.from_numpy(logits) - float_logits).norm(dim=1).mean() / float_logits.norm(dim=1).mean()
            print(f"{profile.name}: {profile.size_bytes / 1e3:6.1f} kB, logits {drift:.1%} from the float model's")


if __name__ == "__main__":
    main()
