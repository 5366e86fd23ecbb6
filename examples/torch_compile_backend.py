"""A model through ``torch.compile`` and TVM: in float32, and in int8 at half the size.

python examples/torch_compile_backend.py
"""

import logging

import torch
from torch import nn


def main() -> None:
    # What it compiles, how long that takes, and what stays in eager and why.
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("t3c_compile.torch_backend").setLevel(logging.INFO)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    x = torch.randn(128, 64)

    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="t3c")(x)
        worst = (compiled - expected).abs().max() / expected.abs().max()
        print(f"float32: within {worst:.1e} of eager's largest output")

        torch.compiler.reset()
        smaller = torch.compile(model, backend="t3c", options={"size": 0.5})(x)
        agree = (smaller.argmax(1) == expected.argmax(1)).float().mean()
        print(f"half the int8 size: the same class on {agree:.0%} of the inputs (random weights, not trained)")


if __name__ == "__main__":
    main()
