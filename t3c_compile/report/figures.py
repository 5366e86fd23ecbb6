"""The page's plots, and the map of ``sensitivity``, as matplotlib figures, for papers and notebooks:
``pip install 't3c-compile[report]'``.

Each function returns a new ``matplotlib.figure.Figure``; save it with ``figure.savefig(path)``.
"""

from base64 import b64encode
from collections import defaultdict
from collections.abc import Sequence
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t3c_compile.passes.errors import T3CError
from t3c_compile.report.data import Report, ReportError, TargetReport
from t3c_compile.runtime import ProfileInfo

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from t3c_compile.sensing import Effect

_FIRST, _SECOND = "#0b6a8a", "#b45f14"
_COSTS = {"latency_ms": "latency of a call, ms", "size_mb": "size of the weights, MB"}
_EFFECTS = {
    "drift": "drift of the logits, mean 2-norm",
    "kl": "KL from the full model, nats",
    "accuracy_change": "change of accuracy",
}
# Beyond it, options are not named in the cells of a map.
_MOST_NAMED = 16
_QUALITIES = {"accuracy": "accuracy on calibration data, %", "agreement": "same class as the full model, %"}


class PlottingUnavailableError(T3CError):
    """matplotlib is not installed."""


def plot_pareto(report: Report, cost: str = "latency_ms", target: str | None = None) -> "Figure":
    """Accuracy, or agreement, against ``latency_ms`` or ``size_mb`` of every profile and baseline on ``target`` (the
    first by default)."""
    if cost not in _COSTS:
        raise ReportError(f"there is no plot of {cost!r}: name one of {', '.join(_COSTS)}")
    profiles = _target(report, target).profiles
    figure, axes = _figure(5.2, 3.6)
    points = [(getattr(profile, cost), 100 * profile.quality[report.quality]) for profile in profiles]
    others = [other for other in report.baselines if getattr(other, cost) is not None]
    places = [(getattr(other, cost), 100 * other.accuracy) for other in others]
    axes.step(*zip(*_front(points + places), strict=True), where="post", color=_FIRST, alpha=0.4)
    _scatter(axes, points, [profile.name for profile in profiles], marker="o", color=_FIRST, label="profiles")
    if others:
        _scatter(axes, places, [other.name for other in others], marker="D", color=_SECOND, label="baselines")
        axes.legend(frameon=False)
    costs = [x for x, _ in points + places]
    if max(costs) > 8 * min(costs) > 0:
        axes.set_xscale("log")
    axes.margins(y=0.15)
    sources = sorted({_known(profile) for profile in profiles})
    axes.set_xlabel(_COSTS[cost] + (f" ({'; '.join(sources)})" if cost == "latency_ms" else ""))
    axes.set_ylabel(_QUALITIES[report.quality])
    return figure


def plot_certificates(report: Report, target: str | None = None) -> "Figure":
    """Each profile's bound of drift against the drift seen on calibration data: its 95th percentile, with a line from
    the mean to the greatest; the mean alone of artifacts that hold no more. Diamonds are conformal bounds."""
    profiles = _target(report, target).profiles
    figure, axes = _figure(4.4, 4.2)
    spread = all({"drift_p95", "drift_max"} <= profile.quality.keys() for profile in profiles)
    seen = [profile.quality["drift_p95" if spread else "drift"] for profile in profiles]
    bounds = [profile.certificate["bound"] for profile in profiles]
    names = [profile.name for profile in profiles]
    if spread:
        means, most = ([profile.quality[key] for profile in profiles] for key in ("drift", "drift_max"))
        axes.vlines(bounds, means, most, color=_FIRST, alpha=0.5)
    _scatter(axes, list(zip(bounds, seen, strict=True)), names, marker="o", color=_FIRST, label="calibration data")
    conformal = [(p.drift_bound, drift) for p, drift in zip(profiles, seen, strict=True) if p.drift_bound is not None]
    if conformal:
        axes.scatter(*zip(*conformal, strict=True), marker="D", color=_SECOND, label="conformal, compiled library")
    axes.axline((0, 0), slope=1, color="0.5", linestyle="--", linewidth=1)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("certified bound of drift, 2-norm")
    axes.set_ylabel("drift seen, 2-norm: " + ("mean, 95th percentile, greatest" if spread else "mean"))
    axes.legend(frameon=False)
    return figure


def plot_sensitivity(report: Report) -> "Figure":
    """How every profile's bound of drift divides among the layers: a map [layers, profiles] in logit 2-norm.

    Raises:
        ReportError: the artifact does not hold the parts.
    """
    values = report.sensitivity()
    if values is None:
        raise ReportError(f"{report.name} does not hold the parts of its certificates by layer: lower the model again")
    figure, axes = _figure(
        1.6 + 0.6 * len(report.profiles) + 0.07 * max(map(len, report.layers)), 1 + 0.2 * len(values)
    )
    image = axes.imshow(values, aspect="auto", cmap="Blues", vmin=0)
    axes.set_xticks(range(len(report.profiles)), [profile.name for profile in report.profiles])
    axes.set_yticks(range(len(values)), report.layers, fontsize=7)
    figure.colorbar(image, label="part of the bound, 2-norm")
    return figure


def plot_options(effects: Sequence["Effect"], metric: str = "drift") -> "Figure":
    """What every option of a layer alone does (``t3c_compile.sensitivity``): a map [layers, options], the options of a
    chain from least to greatest, of ``drift``, ``kl`` or ``accuracy_change``."""
    if metric not in _EFFECTS:
        raise ReportError(f"there is no map of {metric!r}: name one of {', '.join(_EFFECTS)}")
    if not _has(effects, metric):
        raise ReportError(f"the effects have no {metric}: measure sensitivity with labels")
    rows = {layer: list(found) for layer, found in groupby(effects, lambda effect: effect.layer)}
    columns = max(len(row) for row in rows.values())
    named = columns <= _MOST_NAMED
    width = 2 + (0.45 if named else 0.2) * columns + 0.07 * max(map(len, rows))
    figure, axes = _figure(width, max(3, 1 + 0.3 * len(rows)))
    blank = float("nan")
    values = [[getattr(e, metric) for e in row] + [blank] * (columns - len(row)) for row in rows.values()]
    if metric == "accuracy_change":
        most = max(abs(effect.accuracy_change or 0.0) for effect in effects) or 1.0
        image = axes.imshow(values, aspect="auto", cmap="RdBu", vmin=-most, vmax=most)
    else:
        # Drifts of one network lie decades apart.
        scale = "log" if any(value > 0 for row in values for value in row) else "linear"
        image = axes.imshow(values, aspect="auto", cmap="Blues", norm=scale)
    for place, row in enumerate(rows.values() if named else ()):
        for column, effect in enumerate(row):
            name = str(effect.option).removeprefix(effect.option.form).strip().replace(" ", "\n")
            red, green, blue, _ = image.to_rgba(values[place][column])
            ink = "white" if red + green + blue < 1.5 else "black"
            axes.annotate(name, (column, place), ha="center", va="center", fontsize=5, color=ink)
    axes.set_xticks([])
    axes.set_xlabel("options of the layer from the least to the greatest, all others full")
    axes.set_yticks(range(len(rows)), [layer.replace("$", r"\$") for layer in rows], fontsize=7)
    figure.colorbar(image, label=_EFFECTS[metric])
    return figure


def require_drawing(output: Path) -> None:
    """Raise :class:`ReportError` where ``output`` is neither a page nor an image that matplotlib can write."""
    known = {"html", *_figure(1, 1)[0].canvas.get_supported_filetypes()}
    if output.suffix.removeprefix(".") not in known:
        raise ReportError(
            f"cannot draw {output}: name it .html, or as an image ({', '.join(sorted(known - {'html'}))})"
        )


def draw_options(effects: Sequence["Effect"], output: Path) -> None:
    """Write the map of drift as an image, or all maps there are as one HTML page that needs no network.

    Raises:
        ReportError: ``output`` is neither, or cannot be written.
    """
    require_drawing(output)
    try:
        if output.suffix == ".html":
            output.write_text(_page([plot_options(effects, metric) for metric in _EFFECTS if _has(effects, metric)]))
        else:
            plot_options(effects).savefig(output)
    except OSError as error:
        raise ReportError(f"cannot write {output}: {error}") from error


def _page(figures: Sequence["Figure"]) -> str:
    """Figures below each other; names are drawn, so none is markup."""
    images = []
    for figure in figures:
        drawn = BytesIO()
        figure.savefig(drawn, format="svg")
        images.append(f'<p><img src="data:image/svg+xml;base64,{b64encode(drawn.getvalue()).decode()}"></p>')
    body = "\n".join(images)
    return f'<!doctype html>\n<meta charset="utf-8">\n<title>Sensitivity</title>\n{body}\n'


def _has(effects: Sequence["Effect"], metric: str) -> bool:
    return all(getattr(effect, metric) is not None for effect in effects)


def plot_layers(report: Report, profile: str) -> "Figure":
    """Rank and weight bits of every layer in ``profile``; dense layers have bars of bits alone."""
    chosen = next((found for found in report.profiles if found.name == profile), None)
    if chosen is None:
        raise ReportError(f"there is no profile {profile!r}; there are {', '.join(p.name for p in report.profiles)}")
    figure, axes = _figure(7.0, 1 + 0.2 * len(report.layers), columns=2)
    options = [chosen.options[layer] for layer in report.layers]
    for place, key, label, color in ((axes[0], "rank", "rank", _FIRST), (axes[1], "bits", "weight bits", _SECOND)):
        most = max(option[key] for found in report.profiles for option in found.options.values())
        place.barh(range(len(options)), [option[key] for option in options], color=color)
        place.set_xlim(0, 1.05 * max(most, 1))
        place.set_xlabel(f"{label}, {profile}")
        place.invert_yaxis()
    axes[0].set_yticks(range(len(options)), report.layers, fontsize=7)
    axes[1].set_yticks([])
    return figure


def plot_kernels(report: Report, target: str | None = None) -> "Figure":
    """The time of a call of every profile, by family of kernels.

    Raises:
        ReportError: it was not measured.
    """
    found = _target(report, target)
    if found.kernels is None:
        why = found.unmeasured or "read the report with measure=True"
        raise ReportError(f"kernels were not measured: {why}")
    families: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(found.profiles))
    for index, times in enumerate(found.kernels):
        for kernel in times.kernels:
            families[kernel.family][index] += kernel.us
        families["outside kernels"][index] = max(0.0, times.call_us - sum(kernel.us for kernel in times.kernels))
    figure, axes = _figure(6.4, 1.4 + 0.3 * len(found.profiles))
    left = [0.0] * len(found.profiles)
    names = [profile.name for profile in found.profiles]
    for family, widths in sorted(families.items(), key=lambda item: (item[0] == "outside kernels", -sum(item[1]))):
        axes.barh(names, widths, left=left, label=family, color="0.85" if family == "outside kernels" else None)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel(f"microseconds of a call, {found.kernels[0].inputs}")
    axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _figure(width: float, height: float, columns: int = 1) -> tuple["Figure", Any]:
    """A figure of its own, outside pyplot's, of inches, and its axes."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlottingUnavailableError(
            "figures need matplotlib: pip install 't3c-compile[report]' (the HTML page does not need it)"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def _target(report: Report, name: str | None) -> TargetReport:
    if name is None:
        return next(iter(report.targets.values()))
    if name not in report.targets:
        raise ReportError(f"{report.name} has no target {name!r}; it has {', '.join(report.targets)}")
    return report.targets[name]


def _known(profile: ProfileInfo) -> str:
    source = profile.latency_source.partition(":")[0].partition(" ")[0]
    return "90th percentile, measured" if source == "measured" else f"estimated: {source}"


def _front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both, by rising cost."""
    kept: list[tuple[float, float]] = []
    for cost, quality in sorted(points, key=lambda point: (point[0], -point[1])):
        if not kept or quality > kept[-1][1]:
            kept.append((cost, quality))
    return kept


def _scatter(axes: "Axes", points: list[tuple[float, float]], names: list[str], **style: Any) -> None:
    axes.scatter(*zip(*points, strict=True), **style)
    for point, name in zip(points, names, strict=True):
        # A dollar sign would begin a formula.
        axes.annotate(
            name.replace("$", r"\$"), point, xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8
        )
