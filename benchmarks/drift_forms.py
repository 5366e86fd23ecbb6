"""What a bound of an input's drift may be in proportion to: how well each form follows the drifts seen.

    python -m benchmarks.drift_forms --model cnn        (a few minutes; artifacts are those of benchmarks.certificates)

Each form gives a number for an input and a profile. It is scaled for each profile so that its mean is that of the
drift on calibration data; its Pearson correlation with the drift is over all profiles and test inputs together.
``passes`` counts runs of the full model in float32 beside the profile's own; to know the drift itself takes one.

- ``constant``: one number a profile.
- ``norms``: the spectral sum with the norms of this input's activations, ``sum_l L_l ||dW_l|| ||x_l||``.
- ``own gains``: the same with gains of this input, by probes, and what each layer's error makes of its activations,
  ``sum_l L_l(x) ||dW_l x_l||``, rounding of activations included.
- ``signed``: the first order with its signs, ``||sum_l J_l dW_l x_l||``, by one Jacobian-vector product.
- ``signed at both ends``: the mean of that at the full model and at the profile, to second order.
- ``softmax``: the root of the class variance under the profile's own softmax (``drift.scales``).
- ``compared``: the distance from the greatest profile, and a multiple of that profile's ``softmax``.
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.certified_models import BUILDERS, Certified
from t3c_compile.backends.targets import get_target
from t3c_compile.certificate import SpectralProxy, error_norms, observed_drift
from t3c_compile.chain import chains, dense_layers
from t3c_compile.drift import scales
from t3c_compile.passes.base import elastic_calls
from t3c_compile.passes.elastic import elastic_layers
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.path_gains import Tap, first_tensor
from t3c_compile.passes.specialize import with_dense
from t3c_compile.profile import Profile
from t3c_compile.show import show
from t3c_compile.snapping import grid_of

PASSES = {
    "constant": "0",
    "norms": "1",
    "own gains": "1 + 8 backward",
    "signed": "1 + 2 backward",
    "signed at both ends": "2 + 4 backward",
    "softmax": "0",
    "compared": "1 of the greatest profile",
}
_PROBES = 8
Forms = dict[str, Tensor]


class Calls(Interpreter):
    """Runs a graph and keeps what goes into and comes out of every elastic call."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.nodes = [node for node, _ in elastic_calls(gm)]
        self.seen: dict[Node, tuple[Any, Any, Tensor]] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n in self.nodes:
            self.seen[n] = (*self.fetch_args_kwargs_from_env(n), result)
        return result


def at(model: ElasticGraphModule, profile: Profile) -> ElasticGraphModule:
    """A copy of ``model`` at ``profile``."""
    found = copy.deepcopy(model)
    found.set_options(profile.options)
    for name, layer in elastic_layers(found):
        layer.set_activations(profile.activations[name])
    return found.eval()


def outputs(gm: GraphModule, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the outputs of the elastic calls, with a graph of gradients between them."""
    tap = Tap(gm, [node for node, _ in elastic_calls(gm)])
    # Fused attention has no second derivative.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        logits = first_tensor(tap.run(x)).flatten(1)
    return logits, list(tap.outputs.values())


def signed(gm: GraphModule, x: Tensor, errors: list[Tensor]) -> Tensor:
    """``sum_l J_l e_l`` [samples, logits]: a Jacobian-vector product, as the gradient of a gradient."""
    logits, reached = outputs(gm, x)
    probe = torch.zeros_like(logits, requires_grad=True)
    with torch.enable_grad():
        rows = torch.autograd.grad((logits * probe).sum(), reached, create_graph=True)
        total = sum(((row * error).sum() for row, error in zip(rows, errors, strict=True)), torch.zeros(()))
    (product,) = torch.autograd.grad(total, probe)
    return product.detach()


def own_gains(gm: GraphModule, x: Tensor) -> list[Tensor]:
    """Frobenius norms [samples] of the Jacobian from every call, estimated by probes."""
    logits, reached = outputs(gm, x)
    generator = torch.Generator().manual_seed(0)
    squares = [torch.zeros(len(x)) for _ in reached]
    for _ in range(_PROBES):
        probe = torch.randn(logits.shape, generator=generator)
        rows = torch.autograd.grad((logits * probe).sum(), reached, retain_graph=True)
        squares = [square + row.flatten(1).square().sum(1) for square, row in zip(squares, rows, strict=True)]
    return [(square / _PROBES).sqrt() for square in squares]


def norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1) if x.is_floating_point() else torch.full((len(x),), float(x[0].numel())).sqrt()


class Measured:
    """Forms and drifts of every profile on ``x``."""

    def __init__(self, model: ElasticGraphModule, profiles: list[Profile], proxy: SpectralProxy, x: Tensor) -> None:
        calls = Calls(model)
        with torch.no_grad():
            full = first_tensor(calls.run(x))
        seen = list(calls.seen.values())
        layers = [str(node.target) for node in calls.nodes]
        gains = own_gains(model, x)
        copies = [at(model, profile) for profile in profiles]
        greatest = first_tensor(copies[-1](x)).detach()
        near = torch.from_numpy(scales(greatest.numpy())["l2"])
        self.drifts: list[Tensor] = []
        self.forms: list[Forms] = []
        for profile, deployed in zip(profiles, copies, strict=True):
            own = Calls(deployed)
            with torch.no_grad():
                logits = first_tensor(own.run(x))
                theirs, full_layers = dict(elastic_layers(deployed)), dict(elastic_layers(model))
                errors = [theirs[n](*args, **named) - y for n, (args, named, y) in zip(layers, seen, strict=True)]
                back = [
                    y - full_layers[n](*args, **named)
                    for n, (args, named, y) in zip(layers, own.seen.values(), strict=True)
                ]
            first = signed(model, x, errors)
            statistics = [call for n in dict.fromkeys(layers) for call in proxy.statistics[n]]
            weights = {n: error_norms(full_layers[n], [profile.options[n]])[0] for n in dict.fromkeys(layers)}
            terms = [
                call.gain * weights[n] * norm(args[0])
                for n, call, (args, _, _) in zip(layers, statistics, seen, strict=True)
            ]
            self.drifts.append(observed_drift(full, logits))
            self.forms.append(
                {
                    "constant": torch.ones(len(x)),
                    "norms": torch.stack(terms).sum(0),
                    "own gains": torch.stack([g * norm(e) for g, e in zip(gains, errors, strict=True)]).sum(0),
                    "signed": first.norm(dim=1),
                    "signed at both ends": (first + signed(deployed, x, back)).norm(dim=1),
                    "softmax": torch.from_numpy(scales(logits.numpy())["l2"]),
                    "distance": observed_drift(greatest, logits),
                    "near": near,
                }
            )


def measure(model: Certified, count: int) -> list[dict[str, Any]]:
    """One row a form."""
    grid = chains(model.elastic, grid_of([get_target("x86_64")]))
    elastic = with_dense(model.elastic, dense_layers(model.elastic, grid)).eval()
    elastic.set_full()
    proxy = SpectralProxy(elastic, model.calibration)
    calibration = torch.cat([x for (x,) in model.calibration])[:count]
    known, test = (
        Measured(elastic, model.profiles.profiles, proxy, x)
        for x in (calibration, torch.from_numpy(model.samples[:count]))
    )
    factor = float((known.drifts[-1] / known.forms[-1]["near"]).mean())
    for measured in (known, test):
        for forms in measured.forms:
            forms["compared"] = forms.pop("distance") + factor * forms.pop("near")
    rows = []
    for form, passes in PASSES.items():
        scaled = [
            there[form] * (drift.mean() / here[form].mean())
            for there, here, drift in zip(test.forms, known.forms, known.drifts, strict=True)
        ]
        found = float(np.corrcoef(torch.cat(scaled), torch.cat(test.drifts))[0, 1])
        rows.append({"form": form, "passes": passes, "pearson": round(found, 3)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=tuple(BUILDERS), default="cnn")
    parser.add_argument("--count", type=int, default=240, help="calibration and test inputs")
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parents[1] / "build" / "certificates")
    arguments = parser.parse_args()
    model = BUILDERS[arguments.model](arguments.folder / arguments.model)
    show(f"{arguments.model}: form and drift", measure(model, arguments.count), False)


if __name__ == "__main__":
    main()
