"""The command line. Exit codes: 0 done, 1 bad input, 2 usage, 3 no profile fits the budget, 4 damaged artifact."""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from t3c_compile.backends.targets import LOWERED_KINDS, get_target, host_target, require_lowerable
from t3c_compile.budget import Budget, BudgetError
from t3c_compile.inspecting import inspect_artifact, show_files, show_targets
from t3c_compile.manifest import ArtifactError, check_files, read_manifest
from t3c_compile.passes.errors import T3CError
from t3c_compile.show import show

_MODEL_HELP = "package.module:callable, a .pt2 or .onnx file, or a t3c checkpoint"
# What each format of `export` is: the folder of ONNX files, or a dialect of torch-mlir.
_FORMATS = {
    "onnx": "",
    "mlir-torch": "torch",
    "mlir-linalg": "linalg-on-tensors",
    "mlir-tosa": "tosa",
    "mlir-stablehlo": "stablehlo",
}
_KEY_HELP = "Ed25519 private key to sign with, a PEM file"
_DATA_HELP = "package.module:callable returning batches of (*inputs, labels)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except T3CError as error:
        _report(error, arguments.json)
        return 3 if isinstance(error, BudgetError) else 4 if isinstance(error, ArtifactError) else 1
    return 0


def _report(error: Exception, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}), file=sys.stderr)
    else:
        print(f"t3c-compile: error: {error}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="t3c-compile", description="One PyTorch checkpoint, many budgets.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        command.add_argument("--json", action="store_true", help="print JSON instead of tables")
        command.set_defaults(run=run, command=name)
        return command

    c = add("transform", _transform, "make a model elastic and write a t3c checkpoint")
    _add_model(c)
    c.add_argument("--resume", action="store_true", help="keep layers in OUTPUT.resume until done, go on from there")
    c.add_argument("-o", "--output", required=True, help="checkpoint to write, such as MODEL.safetensors")

    c = add("train", _train, "train an elastic model and its controller")
    _add_model(c)
    c.add_argument("--epochs", type=int, default=20, help="passes over the data (default 20)")
    c.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default 1e-3)")
    c.add_argument("--seed", type=int, default=0, help="of every random choice (default 0)")
    c.add_argument("-o", "--output", required=True, help="checkpoint to write; its .resume is gone on from")

    c = add("lower", _lower, "snap a model to profiles and lower them into an artifact")
    _add_model(c)
    c.add_argument("--target", action="append", required=True, help="target name (see `targets`); may be repeated")
    c.add_argument("--profiles", type=int, default=8, help="how many profiles at the most (default 8)")
    c.add_argument("--records", help="file that `tune` wrote; its tiles go before the shipped ones")
    c.add_argument("--sign", metavar="KEY", help=_KEY_HELP)
    c.add_argument("-o", "--output", required=True, help="artifact to write, such as MODEL.t3c")

    c = add("tune", _tune, "snap a model to profiles and tune their kernels on this machine, into a file of records")
    _add_model(c)
    c.add_argument("--target", help="target name (default: this machine)")
    c.add_argument("--profiles", type=int, default=8, help="how many profiles at the most (default 8)")
    c.add_argument("--records", required=True, help="file of records to add to, such as MODEL.tuning.jsonl")
    c.add_argument("--minutes", type=float, default=15.0, help="of measuring at the most (default 15)")
    c.add_argument("--threads", type=int, help="that kernels run on (default: all cores)")
    c.add_argument("--report", action="store_true", help="only show how each kernel stands")
    remote = c.add_mutually_exclusive_group()
    remote.add_argument("--rpc", metavar="HOST:PORT", action="append", help="measure on a TVM RPC server; repeatable")
    remote.add_argument("--tracker", metavar="HOST:PORT", help="measure on all devices of a TVM tracker with the key")
    c.add_argument("--key", default="", help="of the RPC servers")

    c = add("export", _export, "snap a model to profiles and write each as a file for other runtimes")
    _add_model(c)
    c.add_argument("--format", choices=_FORMATS, default="onnx", help="what to write (default onnx)")
    c.add_argument("--target", action="append", help="whose ranks and widths profiles have (default x86_64)")
    c.add_argument("--profiles", type=int, default=8, help="how many profiles at the most (default 8)")
    c.add_argument("-o", "--output", required=True, help="folder to write, such as MODEL-onnx")

    c = add("certify", _certify, "bound the drift of an artifact's profiles from the full model, on samples")
    c.add_argument("artifact")
    c.add_argument("--data", required=True, help="samples: a .npz file or a folder of .npy files, named as the inputs")
    c.add_argument("--reference", help="the full model: a t3c checkpoint, or a .npy file of its logits on the samples")
    c.add_argument("--alpha", type=float, default=0.05, help="share of inputs that may exceed a bound (default 0.05)")
    c.add_argument("--delta", type=float, default=0.05, help="chance that the samples mislead (default 0.05)")
    c.add_argument("--target", help="whose library (default: the first that runs here)")
    c.add_argument("--sign", metavar="KEY", help=_KEY_HELP)
    c.add_argument("--resume", action="store_true", help="keep batches in ARTIFACT.resume until done, go on from there")

    c = add("sign", _sign, "sign an artifact")
    c.add_argument("artifact")
    c.add_argument("--key", required=True, help=_KEY_HELP)

    c = add("verify", _verify, "check an artifact's signature and the hash of every file")
    c.add_argument("artifact")
    c.add_argument("--key", required=True, help="Ed25519 public key, a PEM file")

    c = add("run", _run, "run an artifact on .npy inputs")
    c.add_argument("artifact")
    c.add_argument("inputs", nargs="*", help=".npy files; random inputs where none is given")
    for name, unit in (("latency-ms", "milliseconds"), ("energy-mj", "millijoules"), ("size-mb", "megabytes")):
        c.add_argument(f"--{name}", type=float, help=f"budget in {unit}")
    c.add_argument("--max-drift", type=float, help="run the cheapest profile certified to drift less, in 2-norm")
    c.add_argument("--profile", help="run this profile instead of choosing by budget")
    c.add_argument("--target", help="which of the artifact's targets")
    c.add_argument("--verify", metavar="KEY", help="run only what this Ed25519 public key (a PEM file) has signed")
    c.add_argument("-o", "--output", help=".npy file for the first output")

    c = add("inspect", _inspect, "show the profiles of an artifact or of an exported folder")
    c.add_argument("artifact")

    c = add("report", _report_page, "write a page about an artifact: budgets, accuracy and cost, certificates, kernels")
    c.add_argument("artifact")
    c.add_argument("--baselines", help="JSON: [{name, accuracy (0 to 1), latency_ms, size_mb}, ...] to compare with")
    c.add_argument("--measure", action="store_true", help="time every kernel on this machine")
    c.add_argument("-o", "--output", required=True, help="page to write, such as report.html")

    add("targets", _targets, "list the targets; a TOML file named by T3C_TARGETS adds more")

    c = add("demo", _demo, "train, lower and run the digits example, and show what came of it")
    c.add_argument("--model", action="append", choices=("cnn", "vit"), help="only this model (default both)")
    c.add_argument("--seed", type=int, default=0)
    c.add_argument("-o", "--output", default="build/demo", help="folder for the artifacts (default build/demo)")
    return parser


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help=_MODEL_HELP)
    command.add_argument("--input", action="append", default=[], help="example input: 'float32[1,3,224,224]' or .npy")
    command.add_argument("--data", help=_DATA_HELP)
    command.add_argument("--conv", choices=("tucker2", "cp"), default="tucker2", help="form of k x k convolutions")
    command.add_argument("--keep", action="append", default=[], help="glob of layer names to leave alone")
    command.add_argument(
        "--activations",
        choices=("int8", "float32"),
        help="of linear layers; float32 (weight-only) is for decoding (default as in the checkpoint, else int8)",
    )
    command.add_argument(
        "--attention",
        choices=("int8", "float32"),
        help="products of attention; int8 is faster (default as in the checkpoint, else float32)",
    )
    command.add_argument(
        "--residuals",
        choices=("int8", "float32"),
        help="images that are added around convolutions; int8 is faster (default as in the checkpoint, else float32)",
    )


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


def _writable(path: str) -> Path:
    final = Path(path)
    if not final.absolute().parent.is_dir():
        raise T3CError(f"{final.parent} is not a folder: make it first, or choose another output")
    return final


def _transform(arguments: argparse.Namespace) -> None:
    output = _writable(arguments.output)
    folder = output.with_name(f"{output.name}.resume") if arguments.resume else None
    checkpoint = _load(arguments, folder)
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


def _train(arguments: argparse.Namespace) -> None:
    from t3c_compile.loading import batches_of
    from t3c_compile.training import train

    output = _writable(arguments.output)
    if arguments.data is None:
        raise T3CError(f"train needs --data: {_DATA_HELP}")
    checkpoint = _load(arguments)
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


def _lower(arguments: argparse.Namespace) -> None:
    from t3c_compile.artifact import lower
    from t3c_compile.signing import private_key

    if arguments.sign:
        private_key(arguments.sign)  # what is wrong shows before the long work
    targets = [get_target(name) for name in arguments.target]
    for target in targets:
        require_lowerable(target, LOWERED_KINDS)
    output = _writable(arguments.output)
    checkpoint, profiles = _snap(arguments, targets)
    inputs, progress = checkpoint.example_inputs, sys.stderr.isatty()
    records, key = arguments.records, arguments.sign
    lower(checkpoint.model, profiles, targets, output, inputs, progress=progress, records=records, key=key)
    inspect_artifact(str(output), arguments.json)


def _tune(arguments: argparse.Namespace) -> None:
    from t3c_compile.tuning import open_records, tune

    target = get_target(arguments.target) if arguments.target else host_target()
    # What is wrong shows before the long work.
    open_records(_writable(arguments.records), target, remote=bool(arguments.rpc or arguments.tracker))
    checkpoint, profiles = _snap(arguments, [target])
    rows = tune(
        checkpoint.model,
        profiles,
        target,
        arguments.records,
        checkpoint.example_inputs,
        minutes=0 if arguments.report else arguments.minutes,
        threads=arguments.threads,
        rpc=arguments.rpc or (),
        tracker=arguments.tracker,
        key=arguments.key,
        progress=sys.stderr.isatty(),
    )
    show(f"kernels of all profiles, those with the most time first: {arguments.records}", rows, arguments.json)


def _export(arguments: argparse.Namespace) -> None:
    dialect = _FORMATS[arguments.format]
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
    output = _writable(arguments.output)
    checkpoint, profiles = _snap(arguments, targets)
    export(checkpoint.model, profiles.profiles, output, checkpoint.example_inputs)
    suffix = "mlir" if dialect else "onnx"
    files = {f"{profile.name}.{suffix}": profile.to_json() for profile in profiles.profiles}
    show_files(arguments.output, files, arguments.json)


def _snap(arguments: argparse.Namespace, targets: list[Any]) -> tuple[Any, Any]:
    """The checkpoint a command names, and its profiles."""
    if arguments.data is None:
        raise T3CError(f"{arguments.command} needs --data to calibrate activations and certificates: {_DATA_HELP}")
    from t3c_compile.loading import calibration_of
    from t3c_compile.snapping import snap

    checkpoint = _load(arguments)
    calibration, labels = calibration_of(arguments.data)
    progress = sys.stderr.isatty()
    profiles = snap(
        checkpoint.model, calibration, targets, labels, checkpoint.controller, arguments.profiles, progress=progress
    )
    for note in () if arguments.json else profiles.notes:
        print(note)
    return checkpoint, profiles


def _certify(arguments: argparse.Namespace) -> None:
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
    _inspect(arguments)


def _sign(arguments: argparse.Namespace) -> None:
    from t3c_compile.signing import sign

    sign(arguments.artifact, arguments.key)
    show("signed", [{"artifact": arguments.artifact}], arguments.json)


def _verify(arguments: argparse.Namespace) -> None:
    from t3c_compile.signing import verified_manifest

    manifest = verified_manifest(Path(arguments.artifact), arguments.key)
    check_files(Path(arguments.artifact), manifest)
    show("whole, and signed with this key", [{"artifact": arguments.artifact, "key": arguments.key}], arguments.json)


def _run(arguments: argparse.Namespace) -> None:
    import numpy as np

    from t3c_compile.runtime import InputError, load

    session = load(arguments.artifact, arguments.target, arguments.verify)
    try:
        inputs = [np.load(path, allow_pickle=False) for path in arguments.inputs] or _random_inputs(session.inputs)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read inputs: {error}") from error
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


def _random_inputs(inputs: list[dict[str, Any]]) -> list[Any]:
    import numpy as np

    generator = np.random.default_rng(0)
    shapes = [[1 if isinstance(size, str) else size for size in entry["shape"]] for entry in inputs]
    return [
        generator.standard_normal(shape).astype(entry["dtype"]) for entry, shape in zip(inputs, shapes, strict=True)
    ]


def _inspect(arguments: argparse.Namespace) -> None:
    inspect_artifact(arguments.artifact, arguments.json)


def _report_page(arguments: argparse.Namespace) -> None:
    from t3c_compile.report import read_report, write_page

    output, baselines = _writable(arguments.output), arguments.baselines or ()
    write_page(read_report(arguments.artifact, baselines, arguments.measure, sys.stderr.isatty()), output)
    show("report", [{"artifact": arguments.artifact, "page": str(output)}], arguments.json)


def _targets(arguments: argparse.Namespace) -> None:
    show_targets(arguments.json)


def _demo(arguments: argparse.Namespace) -> None:
    from t3c_compile.demo import demo

    demo(arguments.model or ["cnn", "vit"], arguments.seed, Path(arguments.output), arguments.json)


if __name__ == "__main__":
    sys.exit(main())
