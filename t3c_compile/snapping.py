"""Snap: the budget axis becomes a few nested profiles on a target's grid."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from t3c_compile.backends.targets import OWN_TARGETS, Target
from t3c_compile.certificate import SpectralProxy, certified_drift, logits_of, observed_drifts
from t3c_compile.chain import Grid, chains, dense_layers
from t3c_compile.cost import Cost, Times, kept_bytes, option_costs, profile_cost
from t3c_compile.energy import MODELLED
from t3c_compile.groups import Groups, group_top, layer_groups, member_levels
from t3c_compile.memory import activation_bytes, fits, require_fit
from t3c_compile.npu_cost import npu_costs
from t3c_compile.passes.elastic import elastic_layers
from t3c_compile.passes.errors import DataError, T3CError
from t3c_compile.passes.fit_inputs import require_fitting
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.option import Option
from t3c_compile.passes.specialize import with_dense
from t3c_compile.profile import Profile, ProfileSet
from t3c_compile.progress import progress_bar
from t3c_compile.transforming import observe

Inputs = tuple[Any, ...]
Levels = dict[str, int]


def _statement(count: int, share: float) -> str:
    return (
        f"With probability 0.95 over the draw of {count} calibration samples, this holds for all profiles at once, in "
        f"torch: at least {share:.4g} of inputs like them have logits whose difference from the full model's has a "
        "2-norm of at most `bound`. `layers` divides it in proportion to the layers' terms of the spectral sum, to "
        "first order."
    )


class OrderedPolicy(Protocol):
    """A controller: options for a budget of three fractions (latency, energy, size), monotone in each."""

    def options(self, budget: Tensor) -> dict[str, Option]: ...


def grid_of(targets: Sequence[Target]) -> Grid:
    """The grid of options that every one of ``targets`` can run."""
    grid = Grid(targets[0].rank_multiple, targets[0].bits)
    for target in targets[1:]:
        grid = grid.join(Grid(target.rank_multiple, target.bits))
    if not grid.bits:
        names = ", ".join(t.name for t in targets)
        raise T3CError(f"targets {names} have no weight width in common: snap and lower for them apart")
    return grid


def snap(
    model: ElasticGraphModule,
    calibration: Sequence[Inputs],
    targets: Sequence[Target],
    labels: Tensor | None = None,
    controller: OrderedPolicy | None = None,
    count: int = 8,
    full_model: bool = False,
    times: Mapping[str, Times] | None = None,
    progress: bool = False,
    exact_npu: bool = False,
) -> ProfileSet:
    """Nested profiles of ``model`` on the grid its targets share.

    Every group of layers (see ``t3c_compile.groups``) climbs its chains one option at a time. With a ``controller`` the
    climb is what it answers as the budget grows; without, the next upgrade is always the one that saves the most
    certified error for its cost. ``count`` points evenly spaced in cost become profiles; one that costs more than
    another and is no closer to the full model on the calibration data is dropped, and the notes say so; others between
    those kept are tried in its place. Where all targets are NPUs, so is one that takes no fewer cycles than a greater
    one on any of them, by its compiler's estimate. Activations are int8 but where
    ``model.set_activation_dtype("float32")`` was called before: then linear layers are weight-only in all profiles.

    With ``times`` no layer has a rank at which it is slower than dense, and a layer that is so at all of them is dense.

    Args:
        calibration: input tuples, also used to set each profile's activation ranges.
        labels: class indices of all calibration samples in order (of all tokens, for a language model), for accuracy.
        full_model: add the full model in float32 as the greatest profile. Its weights are stored beside the integers.
        times: by target, what its layers take (:func:`t3c_compile.kernel_times.kernel_times`); else the roofline says.
        exact_npu: as it is to be lowered: NPUs' cycles are others then.

    Profiles that do not fit into the memory of every target are left out, which the notes say.

    Raises:
        DataError: the calibration inputs or labels do not fit the model.
        MemoryLimitError: the least profile does not fit.
        T3CError: the targets share no width, or their grid leaves every layer one option.
    """
    if not calibration:
        raise T3CError("snap needs calibration inputs: a few hundred samples of real data")
    if count < 1:
        raise T3CError(f"count={count}: snap makes at least one profile")
    for index, inputs in enumerate(calibration):
        require_fitting(model, inputs, f"calibration batch {index}")
    training = model.training
    model.eval()
    grid, known = grid_of(targets), dict(times or {})
    ladder = chains(
        model, grid, lambda name, rank: all(found[name].pays(rank) for found in known.values() if name in found)
    )
    if not full_model and all(len(chain) == 1 for chain in ladder.values()):
        raise T3CError(
            f"the grid of {', '.join(t.name for t in targets)} (ranks that are multiples of {grid.rank_multiple}, "
            f"widths {', '.join(map(str, grid.bits))}) leaves every layer one option, and no profiles to choose from: "
            f"name a target with a finer grid or more widths, or describe one in a file named in {OWN_TARGETS}"
        )
    # A layer whose factors never pay on this grid is deployed dense, and so it is measured dense.
    dense = dense_layers(model, ladder)
    model = with_dense(model, dense) if dense else model
    model.set_full()
    full = logits_of(model, calibration)
    if labels is not None and labels.numel() != (predictions := sum(batch[..., 0].numel() for batch in full)):
        raise DataError(
            f"there are {labels.numel()} labels for {predictions} predictions on the calibration batches: give one for "
            "each (for each token, of a language model), in order"
        )
    errors: dict[str, dict[Option, float]] = {}
    with progress_bar(progress) as bar:
        bar.add_task("gains of the layers", total=None)
        proxy = SpectralProxy(model, calibration)
        if controller is None:
            errors = {
                name: dict(zip(ladder[name], proxy.layer_errors(name, ladder[name]), strict=True))
                for name in bar.track(list(ladder), description="errors of the layers")
            }
    if controller is None:
        path, order = _greedy_path(model, ladder, errors, targets[0], known), "certified error saved per cost"
    else:
        path, order = _controller_path(controller, ladder, layer_groups(model)), "controller"
    sizes = _sizes(model, ladder, path, targets[0])
    activations = activation_bytes(model, calibration[0])
    require_fit("the least profile", sizes[0], activations, targets, "name a target with more memory")
    fitting = [i for i, size in enumerate(sizes) if fits(size, activations, targets)]
    beyond, sizes = len(sizes) - len(fitting), sizes[: len(fitting)]
    # Of all that are measured, those kept are chosen by what was measured: so the bounds of all hold at once.
    measured, most = dict[int, Profile](), 2 * count
    with progress_bar(progress) as bar:

        def measure(chosen: list[dict[str, Option]]) -> list[Profile]:
            return [
                _measure(model, options, calibration, full, labels, proxy, errors, targets, known, exact_npu, most)
                for options in bar.track(chosen, description="profiles")
            ]

        points = _spread(sizes, count)
        while points:
            options = [{name: ladder[name][level] for name, level in path[i].items()} for i in points]
            measured |= dict(zip(points, measure(options), strict=True))
            kept, notes = drop_dominated([measured[i] for i in sorted(measured)])
            if all(target.cost == "vela" for target in targets):
                # A CPU's own cost is not known here, and what saves an NPU nothing may pay there.
                kept, costly = drop_costly(kept)
                notes += costly
            # Those dropped are replaced by points between the ones kept, below where that is one alone.
            missing = min(count - len(kept), most - len(measured))
            ends = [i for i in measured if measured[i] in kept]
            points = _between(sizes, ends if len(ends) > 1 else [0, *ends], set(measured))[: max(0, missing)]
        if full_model:
            kept += measure([_full_options(model, ladder)])
    if beyond:
        notes.append(f"the targets' memory ends the climb at {round(sizes[-1])} bytes, {beyond} steps early")
    model.set_full()
    model.train(training)
    for index, profile in enumerate(kept):
        profile.name = f"p{index}"
    for high, low in pairwise(reversed(kept)):
        # What two profiles' samples say may cross by chance; the greater bound holds for the lesser profile too.
        if low.certificate["bound"] < high.certificate["bound"]:
            _set_bound(low.certificate, high.certificate["bound"])
    return ProfileSet(kept, order, notes)


def _full_options(model: ElasticGraphModule, ladder: Mapping[str, tuple[Option, ...]]) -> dict[str, Option]:
    forms = {name: chain[0].form for name, chain in ladder.items()}
    return {
        name: Option(forms[name], 0 if forms[name] == "dense" else layer.max_rank, 32)
        for name, layer in elastic_layers(model)
    }


def _greedy_path(
    model: ElasticGraphModule,
    ladder: Mapping[str, tuple[Option, ...]],
    errors: Mapping[str, Mapping[Option, float]],
    target: Target,
    times: Mapping[str, Times],
) -> list[Levels]:
    """From all-least to all-greatest, one upgrade a step, from a table of errors and costs."""
    layers, known = dict(elastic_layers(model)), times.get(target.name, {})
    costs = {
        name: [_scalar(cost, target) for cost in option_costs(layers[name], ladder[name], target, known.get(name))]
        for name in ladder
    }

    def worth(group: tuple[str, ...], level: int) -> float:
        now, then = member_levels(group, level, ladder), member_levels(group, level + 1, ladder)
        saved = sum(errors[name][ladder[name][now[name]]] - errors[name][ladder[name][then[name]]] for name in group)
        return saved / max(sum(costs[name][then[name]] - costs[name][now[name]] for name in group), 1e-12)

    levels = dict.fromkeys(layer_groups(model), 0)
    path = [dict.fromkeys(ladder, 0)]
    while rising := [group for group, level in levels.items() if level < group_top(group, ladder)]:
        best = max(rising, key=lambda group: worth(group, levels[group]))
        levels[best] += 1
        path.append(path[-1] | member_levels(best, levels[best], ladder))
    return path


def _controller_path(
    controller: OrderedPolicy, ladder: Mapping[str, tuple[Option, ...]], groups: Groups
) -> list[Levels]:
    """What the controller answers along the diagonal of budgets, snapped to the ladder; its ends are added."""
    path = [dict.fromkeys(ladder, 0)]
    for step in torch.linspace(0, 1, 257):
        options = controller.options(step.repeat(3))
        asked = {name: _level_of(options[name], chain) for name, chain in ladder.items()}
        levels = {name: level for group in groups for name, level in _together(group, asked, ladder).items()}
        # Two grids may round differently; the maximum with the point before keeps the path nested.
        levels = {name: max(level, path[-1][name]) for name, level in levels.items()}
        if levels != path[-1]:
            path.append(levels)
    top = {name: len(chain) - 1 for name, chain in ladder.items()}
    return path if path[-1] == top else [*path, top]


def _together(group: tuple[str, ...], asked: Levels, ladder: Mapping[str, tuple[Option, ...]]) -> Levels:
    """The greatest levels that a group can have without any of its layers going above what was asked for it."""
    rising = (member_levels(group, level, ladder) for level in range(group_top(group, ladder), -1, -1))
    return next(levels for levels in rising if all(level <= asked[name] for name, level in levels.items()))


def _level_of(option: Option, chain: tuple[Option, ...]) -> int:
    """The greatest level of ``chain`` whose rank and bits do not exceed the option's."""
    fitting = [i for i, o in enumerate(chain) if o.rank <= option.rank and o.bits <= option.bits]
    return fitting[-1] if fitting else 0


def _scalar(cost: Cost, target: Target) -> float:
    """One number to divide by: microseconds, measured or at the roofline, plus the bytes at memory speed."""
    return 1e3 * cost.latency_ms + cost.size_bytes / (target.bandwidth_gbps * 1e3)


def _sizes(
    model: ElasticGraphModule, ladder: Mapping[str, tuple[Option, ...]], path: list[Levels], target: Target
) -> list[float]:
    """Bytes at every point of the path."""
    layers, kept = dict(elastic_layers(model)), kept_bytes(model)
    costs = {name: [cost.size_bytes for cost in option_costs(layers[name], ladder[name], target)] for name in ladder}
    return [kept + sum(costs[name][level] for name, level in levels.items()) for levels in path]


def _spread(sizes: list[float], count: int) -> list[int]:
    """``count`` points evenly spaced in the logarithm of size, ends included."""
    ratio = sizes[-1] / sizes[0]
    wanted = [sizes[0] * ratio ** (step / max(1, count - 1)) for step in range(count)]
    return sorted({min(range(len(sizes)), key=lambda i: abs(sizes[i] - w)) for w in wanted})


def _between(sizes: list[float], ends: list[int], measured: set[int]) -> list[int]:
    """Points not yet measured, each nearest the middle of two neighbours of ``ends``; the widest gap first."""
    found: list[tuple[float, int]] = []
    for low, high in pairwise(sorted(ends)):
        free = [i for i in range(low + 1, high) if i not in measured]
        if free:
            middle = (sizes[low] * sizes[high]) ** 0.5
            found.append((sizes[low] / sizes[high], min(free, key=lambda i: abs(sizes[i] - middle))))
    return [point for _, point in sorted(found)]


def quality(full: list[Tensor], logits: list[Tensor], labels: Tensor | None) -> dict[str, float]:
    """``kl``, ``agreement`` and ``accuracy`` as means over predictions (a language model makes one per token), and
    ``drift`` by sample, of logits by batch from the full model's."""
    drifts = observed_drifts(full, logits)
    pairs = list(zip(full, logits, strict=True))
    chosen = torch.cat([batch.argmax(-1).flatten() for batch in logits])
    agreed = torch.cat([batch.argmax(-1).flatten() for batch in full]) == chosen
    divergence = [
        F.kl_div(found.log_softmax(-1), batch.log_softmax(-1), reduction="sum", log_target=True)
        for batch, found in pairs
    ]
    found = {
        "kl": float(torch.stack(divergence).sum()) / len(chosen),
        "agreement": float(agreed.float().mean()),
        "drift": float(drifts.mean()),
        "drift_p95": float(drifts.quantile(0.95)),
        "drift_max": float(drifts.max()),
    }
    if labels is not None:
        found["accuracy"] = float((chosen == labels.flatten()).float().mean())
    return found


def _measure(
    model: ElasticGraphModule,
    options: dict[str, Option],
    calibration: Sequence[Inputs],
    full: list[Tensor],
    labels: Tensor | None,
    proxy: SpectralProxy,
    errors: Mapping[str, Mapping[Option, float]],
    targets: Sequence[Target],
    times: Mapping[str, Times],
    exact_npu: bool,
    statements: int,
) -> Profile:
    model.set_options(options)
    observe(model, calibration)
    activations = {name: layer.activations() for name, layer in elastic_layers(model)}
    logits = logits_of(model, calibration)
    drifts = observed_drifts(full, logits)
    costs: dict[str, dict[str, Any]] = {}
    size = 0.0
    for target in targets:
        known = times.get(target.name)
        cost = profile_cost(model, options, target, known)
        size = cost.size_bytes
        costs[target.name] = {
            "latency_ms": cost.latency_ms,
            "energy_mj": cost.energy_mj,
            "source": "sum of the layers' kernels, measured" if known else target.cost_source,
            "energy_source": MODELLED,
        }
    bound, share = certified_drift(drifts, statements)
    terms = proxy.certify(options, activations, errors)
    statement, total = _statement(len(drifts), share), sum(terms.values())
    certificate = {"kind": "spectral", "bound": total, "layers": terms, "share": share, "statement": statement}
    _set_bound(certificate, bound)
    profile = Profile("", options, activations, round(size), quality(full, logits, labels), certificate, costs)
    profile.costs |= npu_costs(model, profile, calibration[0], targets, exact_npu)
    return profile


def _set_bound(certificate: dict[str, Any], bound: float) -> None:
    """Give a certificate another bound, divided among the layers as before."""
    scale = bound / (certificate["bound"] or 1.0)
    certificate["layers"] = {name: scale * term for name, term in certificate["layers"].items()}
    certificate["bound"] = bound


def drop_dominated(profiles: list[Profile]) -> tuple[list[Profile], list[str]]:
    """Profiles by rising size whose divergence from the full model falls; the others, and why, in the notes."""
    kept: list[Profile] = []
    notes: list[str] = []
    for profile in profiles:
        better = next((k for k in kept if k.quality["kl"] <= profile.quality["kl"]), None)
        if better is not None:
            notes.append(
                f"a profile of {profile.size_bytes} bytes was dropped: KL {profile.quality['kl']:.2e} on calibration "
                f"data, no better than {better.quality['kl']:.2e} at {better.size_bytes} bytes"
            )
        else:
            kept.append(profile)
    return kept, notes


def drop_costly(profiles: list[Profile]) -> tuple[list[Profile], list[str]]:
    """Profiles by rising size whose cycles rise on every NPU; the others, and why, in the notes."""
    kept: list[Profile] = []
    notes: list[str] = []
    for profile in profiles:
        while kept and (target := _no_slower_on(profile, kept[-1])) is not None:
            less, more = (f"{p.costs[target]['cycles']}" for p in (kept[-1], profile))
            notes.append(
                f"a profile of {kept.pop().size_bytes} bytes was dropped: {less} cycles on {target}, no fewer than the "
                f"{more} of one of {profile.size_bytes} bytes, which is closer to the full model"
            )
        kept.append(profile)
    return kept, notes


def _no_slower_on(greater: Profile, lesser: Profile) -> str | None:
    """A target where ``greater`` takes no more cycles, where both are known."""
    for target, cost in greater.costs.items():
        if "cycles" in cost and cost["cycles"] <= lesser.costs[target].get("cycles", 0):
            return target
    return None
