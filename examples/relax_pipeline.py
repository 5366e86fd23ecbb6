"""A profile as a Relax module in a TVM pipeline of one's own: `python examples/relax_pipeline.py`.

The pipeline binds the weights, runs a pass of the user's, schedules with the package's kernels and builds; the result
is held against the same profile in torch.
"""

import numpy as np
import torch
import torch.nn.functional as F
import tvm
from torch import Tensor, nn
from tvm import relax
from tvm.relax.dpl import is_op, rewrite_call, wildcard

import t3c_compile as t3c
from t3c_compile.backends.targets import get_target
from t3c_compile.backends.tvm.pipelines import KERNEL_PIPELINE, runtime_pipeline
from t3c_compile.backends.tvm.relax_module import relax_module, schedule
from t3c_compile.passes.specialize import specialize


class Net(nn.Module):
    """Two convolutions and a linear, [N, 3, 8, 8] to [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, 2, 1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.wide(F.relu(self.stem(x))))
        return self.head(x.mean((2, 3)))


@relax.transform.function_pass(opt_level=0)
class ReluAsMaximum:
    """A pass of the user's own, any Relax pass will do: relu(x) is written max(x, 0)."""

    def transform_function(
        self, function: relax.Function, module: tvm.IRModule, context: tvm.ir.transform.PassContext
    ) -> relax.Function:
        x = wildcard()

        def rewrite(call: relax.Call, matches: dict) -> relax.Expr:  # type: ignore[type-arg]
            return relax.op.maximum(matches[x], relax.const(0.0))

        return rewrite_call(is_op("relax.nn.relu")(x), rewrite, function)


def main() -> float:
    """The largest difference from torch over the largest logit."""
    torch.manual_seed(0)
    model, example = Net().eval(), torch.randn(4, 3, 8, 8)
    elastic = t3c.transform(model, (example,))
    target = get_target("x86_64")
    profile = t3c.snap(elastic, [(torch.randn(32, 3, 8, 8),)], [target]).profiles[0]

    module, weights = relax_module(elastic, profile, (example,), target)
    parameters = module["main"].params[int(module["main"].attrs["num_input"]) :]
    pipeline = tvm.ir.transform.Sequential(
        [
            relax.transform.BindParams("main", dict(zip([p.name for p in parameters], weights, strict=True))),
            ReluAsMaximum(),
            schedule(target),
        ]
    )
    executable = relax.build(
        pipeline(module),
        tvm.target.Target(dict(target.tvm)),
        relax_pipeline=runtime_pipeline(),
        tir_pipeline=KERNEL_PIPELINE,
    )
    machine = relax.VirtualMachine(executable, tvm.cpu())

    x = torch.randn(5, 3, 8, 8)
    found = machine["main"](tvm.runtime.tensor(x.numpy())).numpy()
    expected = specialize(elastic, profile.options, profile.activations)(x).detach().numpy()
    difference = float(np.abs(found - expected).max() / np.abs(expected).max())
    relus = [str(each).count("nn.relu") for each in (module, ReluAsMaximum()(module))]
    print(f"{profile.name}: {relus[0]} relus before the user's pass, {relus[1]} after")
    print(f"largest difference from torch over the largest logit: {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()
