"""What each command does, from its parsed arguments."""

import argparse
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

from t3c_compile.backends.targets import get_target, host_target
from t3c_compile.budget import Budget
from t3c_compile.inspecting import inspect_artifact, show_files, show_targets
from t3c_compile.manifest import check_files, read_manifest
from t3c_compile.passes.errors import T3CError
from t3c_compile.show import show

DATA_HELP = "package.module:callable returning batches of (*inputs, labels)"
FORMATS = {
    "onnx": "",
    "mlir-torch": "torch",
    "mlir-linalg": "linalg-on-tensors",
    "mlir-tosa": "tosa",
    "mlir-stablehlo": "stablehlo",
}
"""What each format of ``export`` is: the folder of ONNX files, or a dialect of torch-mlir."""


def transform(arguments: argparse.Namespace) -> None:
    output = _file(arguments.output)
    folder = output.with_name(f"{output.name}.resume") if arguments.resume else None
    checkpoint = _load(arguments, folder)
    _note_what_cannot_be_lowered(checkpoint)
    checkpoint.save(output)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    report = checkpoint.model.report
    rows = [
        {"layer": r.layer, "op": r.op, "shape": "x".join(map(str, r.shape)), "form": r.form, "max_rank": r.max_rank}
        | {"reason": r.reason}
        for r in (*report.elastic.values(), *report.kept.values())
    ]
    show(f"{len(report.elastic)} elastic layers, {len(report.kept)} kept: {output}", rows, arguments.json)


def train(arguments: argparse.Namespace) -> None:
    from t3c_compile.loading import batches_of
    from t3c_compile.training import train

    output = _file(arguments.output)
    if arguments.data is None:
        raise T3CError(f"train needs --data: {DATA_HELP}")
    checkpoint = _load(arguments)
    _note_what_cannot_be_lowered(checkpoint)
    result = train(
        checkpoint.model,
        batches_of(arguments.data),
        epochs=arguments.epochs,
        lr=arguments.lr,
        seed=arguments.seed,
        controller=checkpoint.controller,
        progress=sys.stderr.isatty(),
        checkpoint=output.with_name(f"{output.name}.resume"),
    )
    checkpoint.controller = result.controller
    checkpoint.save(output)
    output.with_name(f"{output.name}.resume").unlink(missing_ok=True)
    rows = [{"epoch": epoch, **terms} for epoch, terms in enumerate(result.history)]
    show(f"loss by epoch: {output}", rows, arguments.json)


def lower(arguments: argparse.Namespace) -> None:
    from t3c_compile.artifact import lower, require_free
    from t3c_compile.signing import private_key

    if arguments.sign:
        private_key(arguments.sign)  # what is wrong shows before the long work
    targets = [get_target(name) for name in arguments.target]
    output = Path(arguments.output)
    require_free(output)
    if arguments.records is not None and not Path(arguments.records).is_file():
        raise T3CError(f"there are no records at {arguments.records}: `t3c-compile tune` writes them")
    checkpoint, profiles = _snap(arguments, targets, measure=arguments.records is not None)
    inputs, progress = checkpoint.example_inputs, sys.stderr.isatty()
    lower(
        checkpoint.model,
        profiles,
        targets,
        output,
        inputs,
        progress=progress,
        records=arguments.records,
        key=arguments.sign,
        exact_npu=arguments.exact_npu,
    )
    inspect_artifact(str(output), arguments.json)


def tune(arguments: argparse.Namespace) -> None:
    from t3c_compile.tuning import open_records, tune

    target = get_target(arguments.target) if arguments.target else host_target()
    # What is wrong shows before the long work.
    remote = bool(arguments.rpc or arguments.tracker)
    if remote:
        from t3c_compile.backends.tvm.farm.devices import find_devices

        find_devices(arguments.rpc or (), arguments.tracker, arguments.key)
    open_records(_file(arguments.records), target, remote)
    checkpoint, profiles = _snap(arguments, [target], measure=True)
    rows = tune(
        checkpoint.model,
        profiles,
        target,
        arguments.records,
        checkpoint.example_inputs,
        minutes=0 if arguments.report else arguments.minutes,
        **_devices(arguments),
    )
    show(f"kernels of all profiles, those with the most time first: {arguments.records}", rows, arguments.json)


def export(arguments: argparse.Namespace) -> None:
    dialect = FORMATS[arguments.format]
    export: Any
    if dialect:
        from t3c_compile.backends.mlir import export_mlir, require_mlir

        require_mlir()
        export = partial(export_mlir, dialect=dialect)
    else:
        from t3c_compile.backends.onnx import export_onnx, require_onnx

        require_onnx()
        export = export_onnx
    targets = [get_target(name) for name in arguments.target or ["x86_64"]]
    output = _place(arguments.output)
    checkpoint, profiles = _snap(arguments, targets, lowering=False)
    export(checkpoint.model, profiles.profiles, output, checkpoint.example_inputs)
    suffix = "mlir" if dialect else "onnx"
    files = {f"{profile.name}.{suffix}": profile.to_json() for profile in profiles.profiles}
    show_files(arguments.output, files, arguments.json)


def sensitivity(arguments: argparse.Namespace) -> None:
    from t3c_compile.loading import calibration_of
    from t3c_compile.report.figures import draw_options, require_drawing
    from t3c_compile.sensing import sensitivity

    if arguments.data is None:
        raise T3CError(f"sensitivity needs --data to measure on: {DATA_HELP}")
    output = None if arguments.output is None else _file(arguments.output)
    if output is not None:
        require_drawing(output)  # what is wrong shows before the long work
    checkpoint = _load(arguments)
    samples, labels = calibration_of(arguments.data)
    targets = arguments.target or ["x86_64"]
    effects = sensitivity(checkpoint.model, samples, labels, targets, sys.stderr.isatty())
    if output is not None:
        draw_options(effects, output)
    rows = [
        {"layer": effect.layer, "rank": effect.option.rank or None, "bits": effect.option.bits}
        | {"drift": effect.drift, "kl": effect.kl, "agreement": effect.agreement}
        | {"accuracy": effect.accuracy, "accuracy_change": effect.accuracy_change}
        for effect in effects
    ]
    show("each layer at each of its options, all others full", rows, arguments.json)


def certify(arguments: argparse.Namespace) -> None:
    from t3c_compile.certifying import certify
    from t3c_compile.loading import read_reference, read_samples

    path = Path(arguments.artifact)
    inputs = read_samples(arguments.data, read_manifest(path)["inputs"])
    reference = None if arguments.reference is None else read_reference(arguments.reference)
    folder = path.with_name(f"{path.name}.resume") if arguments.resume else None
    certify(
        path,
        inputs,
        reference,
        alpha=arguments.alpha,
        delta=arguments.delta,
        target=arguments.target,
        progress=sys.stderr.isatty(),
        resume=folder,
        key=arguments.sign,
    )
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    inspect(arguments)


def bound(arguments: argparse.Namespace) -> None:
    from t3c_compile.bounding import bound_near
    from t3c_compile.checkpoint import Checkpoint
    from t3c_compile.loading import read_samples
    from t3c_compile.profile import Profile

    manifest = read_manifest(Path(arguments.artifact))
    samples, model = read_samples(arguments.data, manifest["inputs"])[0], Checkpoint.load(arguments.reference).model
    profiles = [Profile.from_json(profile) for profile in manifest["profiles"]]
    found = bound_near(model, profiles, samples, arguments.radius, sys.stderr.isatty())
    rows: list[dict[str, Any]] = []
    for profile, (bounds, reason) in zip(profiles, found, strict=True):
        row: dict[str, Any] = {"profile": profile.name, "samples": len(samples), "bounded": len(bounds)}
        for name in ("linf", "l2"):
            values = sorted(getattr(bound, name) for bound in bounds)
            row |= {f"{name}_median": values[len(values) // 2] if values else None}
            row |= {f"{name}_greatest": values[-1] if values else None}
        rows.append(row | ({"reason": reason} if arguments.json else {}))
    show(f"{arguments.artifact}: drift of any input within {arguments.radius:g} of a sample", rows, arguments.json)
    for profile, (_, reason) in zip(profiles, found, strict=True):
        if reason is not None and not arguments.json:
            print(f"{profile.name}: {reason}")


def compare(arguments: argparse.Namespace) -> None:
    from t3c_compile.checkpoint import Checkpoint
    from t3c_compile.comparing import compare
    from t3c_compile.loading import calibration_of

    model, (samples, _) = Checkpoint.load(arguments.reference).model, calibration_of(arguments.data)
    found = compare(arguments.artifact, model, samples, arguments.target, sys.stderr.isatty())
    rows = []
    for comparison in found:
        where = comparison.divergence
        row: dict[str, Any] = {"profile": comparison.profile, "difference": comparison.difference}
        row |= {"node": where and where.node, "layer": where and where.layer, "op": where and where.op}
        row |= {"node_difference": where and where.difference, "node_greatest": where and where.greatest}
        rows.append(row | {"node_share": where and where.share})
    show(f"{arguments.artifact}: greatest difference from torch's outputs, and where it begins", rows, arguments.json)
    if any(comparison.difference and comparison.divergence is None for comparison in found) and not arguments.json:
        print("compiled now, profiles without a node give what torch gives: lower the model again")


def sign(arguments: argparse.Namespace) -> None:
    from t3c_compile.signing import sign

    sign(arguments.artifact, arguments.key)
    show("signed", [{"artifact": arguments.artifact}], arguments.json)


def verify(arguments: argparse.Namespace) -> None:
    from t3c_compile.signing import verified_manifest

    manifest = verified_manifest(Path(arguments.artifact), arguments.key)
    check_files(Path(arguments.artifact), manifest)
    show("whole, and signed with this key", [{"artifact": arguments.artifact, "key": arguments.key}], arguments.json)


def run(arguments: argparse.Namespace) -> None:
    import numpy as np

    from t3c_compile.measuring import made_up
    from t3c_compile.runtime import load

    if arguments.output:
        _file(arguments.output)
    session = load(arguments.artifact, arguments.target, arguments.verify)
    inputs = _arrays(arguments.inputs) or made_up(session.inputs)
    if arguments.profile:
        profile = session.set_profile(arguments.profile)
    else:
        limits = (arguments.latency_ms, arguments.energy_mj, arguments.size_mb, arguments.max_drift)
        profile = session.set_budget(Budget(*limits))
    output = session.run(*inputs)
    first = output[0] if isinstance(output, tuple) else output
    if arguments.output:
        np.save(arguments.output, first)
    row = {"target": session.target, "profile": profile.name, "size_mb": profile.size_mb}
    row |= {"latency_ms": profile.latency_ms, "output": "x".join(map(str, first.shape)), "mean": float(first.mean())}
    show(arguments.artifact, [row], arguments.json)


def bench(arguments: argparse.Namespace) -> None:
    from t3c_compile.benching import bench

    found = bench(
        arguments.artifact,
        _arrays(arguments.inputs) or None,
        target=arguments.target,
        rpc=arguments.rpc or (),
        tracker=arguments.tracker,
        key=arguments.key,
        timeout=arguments.timeout,
        save=arguments.save,
        sign_key=arguments.sign,
        progress=sys.stderr.isatty(),
    )
    rows = [
        {"target": m.target, "profile": m.profile, "latency_ms": m.latency_ms, "latency_p90_ms": m.latency_p90_ms}
        | {"before_ms": m.before_ms, "before": m.before.partition(":")[0].partition(" ")[0], "source": m.source}
        for m in found
    ]
    title = "saved in the artifact" if arguments.save else "not saved (--save): before is what budgets are held against"
    show(f"{arguments.artifact}: {title}", rows, arguments.json)


def inspect(arguments: argparse.Namespace) -> None:
    inspect_artifact(arguments.artifact, arguments.json)


def report(arguments: argparse.Namespace) -> None:
    from t3c_compile.report import read_report, write_page

    output, baselines = _file(arguments.output), arguments.baselines or ()
    write_page(read_report(arguments.artifact, baselines, arguments.measure, sys.stderr.isatty()), output)
    show("report", [{"artifact": arguments.artifact, "page": str(output)}], arguments.json)


def targets(arguments: argparse.Namespace) -> None:
    show_targets(arguments.json)


def demo(arguments: argparse.Namespace) -> None:
    from t3c_compile.demo import demo

    demo(arguments.model or ["cnn", "vit"], arguments.seed, Path(arguments.output), arguments.json)


def _arrays(paths: list[str]) -> list[Any]:
    """Inputs of a model from ``.npy`` files."""
    import numpy as np

    from t3c_compile.runtime import InputError

    try:
        return [np.load(path, allow_pickle=False) for path in paths]
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read inputs: {error}") from error


def _load(arguments: argparse.Namespace, resume: Path | None = None) -> Any:
    from t3c_compile.loading import load_elastic
    from t3c_compile.transforming import Config

    config = Config(conv=arguments.conv, keep=tuple(arguments.keep))
    checkpoint = load_elastic(arguments.model, arguments.input, config, arguments.data, sys.stderr.isatty(), resume)
    if arguments.activations is not None:
        checkpoint.model.set_activation_dtype(arguments.activations)
    if arguments.attention is not None:
        checkpoint.model.set_attention_dtype(arguments.attention)
    if arguments.residuals is not None:
        checkpoint.model.set_residual_dtype(arguments.residuals)
    return checkpoint


def _place(path: str) -> Path:
    final = Path(path)
    if not final.absolute().parent.is_dir():
        raise T3CError(f"{final.parent} is not a folder: make it first, or choose another output")
    return final


def _file(path: str) -> Path:
    final = _place(path)
    if final.is_dir():
        raise T3CError(f"{final} is a folder: name a file to write")
    return final


def _devices(arguments: argparse.Namespace) -> dict[str, Any]:
    """What measures kernels, and how; of `lower`, which has no such options, this machine."""
    chosen = {name: getattr(arguments, name, None) for name in ("threads", "rpc", "tracker", "key")}
    return chosen | {"rpc": chosen["rpc"] or (), "key": chosen["key"] or "", "progress": sys.stderr.isatty()}


def _note_what_cannot_be_lowered(checkpoint: Any) -> None:
    """Ops without code are noted in the report, and said: the model may have another use than an artifact."""
    from t3c_compile.lowerable import require_lowering

    try:
        require_lowering(checkpoint.model, checkpoint.example_inputs, [get_target("x86_64-v3")])
    except Exception as error:
        # Of an op that it has no code for, TVM raises what it likes.
        said = error if isinstance(error, T3CError) else f"{type(error).__name__}: {error}"
        note = f"`lower` and `tune` will refuse this model: {said}"
        print(f"t3c-compile: note: {note}", file=sys.stderr)
        notes = checkpoint.model.report.notes
        notes.extend([] if note in notes else [note])


def _snap(
    arguments: argparse.Namespace, targets: list[Any], measure: bool = False, lowering: bool = True
) -> tuple[Any, Any]:
    """The checkpoint a command names, and its profiles; ``measure``: by the times in ``--records``; ``lowering``: what
    cannot be lowered is refused first."""
    if arguments.data is None:
        raise T3CError(f"{arguments.command} needs --data to calibrate activations and certificates: {DATA_HELP}")
    from t3c_compile.loading import calibration_of
    from t3c_compile.lowerable import require_lowering
    from t3c_compile.passes.fit_inputs import require_fitting
    from t3c_compile.snapping import snap

    checkpoint = _load(arguments)
    if lowering:
        require_lowering(checkpoint.model, checkpoint.example_inputs, targets)
    calibration, labels = calibration_of(arguments.data)
    for index, inputs in enumerate(calibration):
        require_fitting(checkpoint.model, inputs, f"{arguments.data}(): batch {index}")
    times, notes = _times(arguments, checkpoint.model, calibration[0], targets) if measure else ({}, [])
    profiles = snap(
        checkpoint.model,
        calibration,
        targets,
        labels,
        checkpoint.controller,
        arguments.profiles,
        times=times,
        progress=sys.stderr.isatty(),
        exact_npu=getattr(arguments, "exact_npu", False),
    )
    for note in () if arguments.json else (*notes, *profiles.notes):
        print(note)
    return checkpoint, profiles


def _times(
    arguments: argparse.Namespace, model: Any, inputs: tuple[Any, ...], targets: list[Any]
) -> tuple[dict[str, Any], list[str]]:
    """By target what every layer takes, and a note for each that cannot be measured, or not into this file."""
    from t3c_compile.backends.tvm.tuning.records import RecordsError
    from t3c_compile.kernel_times import kernel_times
    from t3c_compile.snapping import grid_of
    from t3c_compile.tuning import TuningError

    times, notes = {}, []
    for target in targets:
        try:
            if target.kind == "cpu":
                devices = _devices(arguments)
                times[target.name] = kernel_times(model, grid_of(targets), target, arguments.records, inputs, **devices)
        except (TuningError, RecordsError) as error:
            notes.append(f"profiles are chosen without times on {target.name}: {error}")
    return times, notes
