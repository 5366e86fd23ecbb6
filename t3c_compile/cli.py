"""The command line. Exit codes: 0 done, 1 bad input, 2 usage, 3 no profile fits the budget, 4 damaged artifact,
130 stopped from the keyboard."""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import shtab

from t3c_compile import commands
from t3c_compile.budget import BudgetError
from t3c_compile.commands import DATA_HELP, FORMATS
from t3c_compile.manifest import ArtifactError
from t3c_compile.passes.errors import T3CError

_MODEL_HELP = "package.module:callable, a .pt2 or .onnx file, or a t3c checkpoint"
_KEY_HELP = "Ed25519 private key to sign with, a PEM file"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = build_parser().parse_args(argv)
    if not sys.warnoptions:
        warnings.simplefilter("ignore", FutureWarning)  # of torch about its own code: nothing a user can act on
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Who read our output has seen enough. Python would complain once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (T3CError, OSError) as error:
        _report(error, arguments.json)
        return 3 if isinstance(error, BudgetError) else 4 if isinstance(error, ArtifactError) else 1
    except KeyboardInterrupt:
        print("t3c-compile: stopped", file=sys.stderr)
        return 130
    return 0


def _report(error: Exception, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}), file=sys.stderr)
    else:
        print(f"t3c-compile: error: {error}", file=sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands. Each has its examples in ``epilog``, one a line, after a heading."""
    parser = argparse.ArgumentParser(
        prog="t3c-compile",
        description="One PyTorch checkpoint, many budgets.",
        epilog="`t3c-compile COMMAND --help` shows a command's options and examples.",
    )
    parser.add_argument("--version", action="version", version=f"t3c-compile {version('t3c-compile')}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Any, help: str, *examples: str) -> argparse.ArgumentParser:
        epilog = "\n  ".join(["examples:" if len(examples) > 1 else "example:", *examples])
        command = subparsers.add_parser(
            name, help=help, description=help, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_argument("--json", action="store_true", help="print JSON instead of tables")
        command.set_defaults(run=run, command=name)
        return command

    c = add(
        "transform",
        commands.transform,
        "make a model elastic and write a t3c checkpoint",
        "t3c-compile transform my.models:resnet --input 'float32[8,3,224,224]' --data my.data:train -o m.safetensors",
        "t3c-compile transform model.onnx --data my.data:train --keep 'head*' --resume -o m.safetensors",
    )
    _add_model(c)
    c.add_argument("--resume", action="store_true", help="keep layers in OUTPUT.resume until done, go on from there")
    _add_output(c, "checkpoint to write, such as MODEL.safetensors")

    c = add(
        "train",
        commands.train,
        "train an elastic model and its controller",
        "t3c-compile train m.safetensors --data my.data:train --epochs 10 -o trained.safetensors",
    )
    _add_model(c)
    c.add_argument("--epochs", type=_count, default=20, help="passes over the data (default 20)")
    c.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default 1e-3)")
    c.add_argument("--seed", type=int, default=0, help="of every random choice (default 0)")
    _add_output(c, "checkpoint to write; its .resume is gone on from")

    c = add(
        "lower",
        commands.lower,
        "snap a model to profiles and lower them into an artifact",
        "t3c-compile lower trained.safetensors --data my.data:train --target x86_64 --target arm64 -o m.t3c",
        "t3c-compile lower trained.safetensors --data my.data:train --target ethos-u55-128 --profiles 4 -o npu.t3c",
    )
    _add_model(c)
    c.add_argument("--target", action="append", required=True, help="target name (see `targets`); may be repeated")
    c.add_argument("--profiles", type=_count, default=8, help="how many profiles at the most (default 8)")
    _add_file(c, "--records", help="file that `tune` wrote: profiles are chosen by its times, and its tiles go first")
    c.add_argument(
        "--exact-npu",
        action="store_true",
        help="an NPU has the integer products alone, its host all rounding: results are the other targets' to the bit",
    )
    _add_file(c, "--sign", metavar="KEY", help=_KEY_HELP)
    _add_output(c, "artifact to write, such as MODEL.t3c")

    c = add(
        "tune",
        commands.tune,
        "snap a model to profiles and tune their kernels on this machine, into a file of records",
        "t3c-compile tune trained.safetensors --data my.data:train --records m.tuning.jsonl --minutes 15",
        "t3c-compile tune trained.safetensors --data my.data:train --records pi.jsonl --target cortex-a76 "
        "--tracker 192.168.0.2:9190 --key pi5",
    )
    _add_model(c)
    c.add_argument("--target", help="target name (default: this machine)")
    c.add_argument("--profiles", type=_count, default=8, help="how many profiles at the most (default 8)")
    _add_file(c, "--records", required=True, help="file of records to add to, such as MODEL.tuning.jsonl")
    c.add_argument("--minutes", type=float, default=15.0, help="of measuring at the most (default 15)")
    c.add_argument("--threads", type=_count, help="that kernels run on (default: all cores)")
    c.add_argument("--report", action="store_true", help="only show how each kernel stands")
    _add_devices(c)

    c = add(
        "export",
        commands.export,
        "snap a model to profiles and write each as a file for other runtimes",
        "t3c-compile export trained.safetensors --data my.data:train -o m-onnx",
        "t3c-compile export trained.safetensors --data my.data:train --format mlir-stablehlo -o m-mlir",
    )
    _add_model(c)
    c.add_argument("--format", choices=FORMATS, default="onnx", help="what to write (default onnx)")
    c.add_argument("--target", action="append", help="whose ranks and widths profiles have (default x86_64)")
    c.add_argument("--profiles", type=_count, default=8, help="how many profiles at the most (default 8)")
    _add_output(c, "folder to write, such as MODEL-onnx")

    c = add(
        "sensitivity",
        commands.sensitivity,
        "show what every rank and width of every layer alone does to the outputs",
        "t3c-compile sensitivity trained.safetensors --data my.data:validation -o map.html",
        "t3c-compile sensitivity trained.safetensors --data my.data:validation --json",
    )
    _add_model(c)
    c.add_argument("--target", action="append", help="whose ranks and widths layers have (default x86_64)")
    _add_file(c, "-o", "--output", help="map to draw: a page, such as map.html, or an image, such as map.png")

    c = add(
        "certify",
        commands.certify,
        "bound the drift of an artifact's profiles from the full model, on samples",
        "t3c-compile certify m.t3c --data samples.npz --reference trained.safetensors --alpha 0.05 --delta 0.05",
    )
    _add_file(c, "artifact")
    _add_file(c, "--data", required=True, help="samples: a .npz file or a folder of .npy files, named as the inputs")
    _add_file(c, "--reference", help="the full model: a t3c checkpoint, or a .npy file of its logits on the samples")
    c.add_argument("--alpha", type=float, default=0.05, help="share of inputs that may exceed a bound (default 0.05)")
    c.add_argument("--delta", type=float, default=0.05, help="chance that the samples mislead (default 0.05)")
    c.add_argument("--target", help="whose library (default: the first that runs here)")
    _add_file(c, "--sign", metavar="KEY", help=_KEY_HELP)
    c.add_argument("--resume", action="store_true", help="keep batches in ARTIFACT.resume until done, go on from there")

    c = add(
        "bound",
        commands.bound,
        "bound the drift of a small network's profiles in the worst case, for all inputs near samples",
        "t3c-compile bound m.t3c --reference trained.safetensors --data samples.npz --radius 0.01",
    )
    _add_file(c, "artifact")
    _add_file(c, "--reference", required=True, help="the t3c checkpoint that was lowered")
    _add_file(c, "--data", required=True, help="samples: a .npz file or a folder of .npy files, named as the input")
    c.add_argument("--radius", type=float, required=True, help="greatest change of every number of an input")

    c = add(
        "compare",
        commands.compare,
        "compare an artifact's outputs with torch's, and name the first node where they part",
        "t3c-compile compare m.t3c --reference trained.safetensors --data my.data:validation",
    )
    _add_file(c, "artifact")
    _add_file(c, "--reference", required=True, help="the t3c checkpoint that was lowered")
    c.add_argument("--data", required=True, help=DATA_HELP)
    c.add_argument("--target", help="whose library (default: the first that runs here)")

    c = add("sign", commands.sign, "sign an artifact", "t3c-compile sign m.t3c --key private.pem")
    _add_file(c, "artifact")
    _add_file(c, "--key", required=True, help=_KEY_HELP)

    c = add(
        "verify",
        commands.verify,
        "check an artifact's signature and the hash of every file",
        "t3c-compile verify m.t3c --key public.pem",
    )
    _add_file(c, "artifact")
    _add_file(c, "--key", required=True, help="Ed25519 public key, a PEM file")

    c = add(
        "run",
        commands.run,
        "run an artifact on .npy inputs",
        "t3c-compile run m.t3c input.npy --latency-ms 2 --size-mb 1.5 -o logits.npy",
        "t3c-compile run m.t3c --profile p3 --json",
    )
    _add_file(c, "artifact")
    _add_file(c, "inputs", nargs="*", help=".npy files; one made-up sample where none is given")
    for name, unit in (("latency-ms", "milliseconds"), ("energy-mj", "millijoules"), ("size-mb", "megabytes")):
        c.add_argument(f"--{name}", type=float, help=f"budget in {unit}")
    c.add_argument("--max-drift", type=float, help="run the cheapest profile certified to drift less, in 2-norm")
    c.add_argument("--profile", help="run this profile instead of choosing by budget")
    c.add_argument("--target", help="which of the artifact's targets")
    _add_file(c, "--verify", metavar="KEY", help="run only what this Ed25519 public key (a PEM file) has signed")
    _add_file(c, "-o", "--output", help=".npy file for the first output")

    c = add(
        "bench",
        commands.bench,
        "measure an artifact's profiles on this machine or on devices",
        "t3c-compile bench m.t3c",
        "t3c-compile bench m.t3c --target cortex-a76 --rpc 192.168.0.7:9090 --save",
        "t3c-compile bench m.t3c tokens.npy --target cortex-a76 --tracker 192.168.0.2:9190 --key pi5 --json",
    )
    _add_file(c, "artifact")
    _add_file(c, "inputs", nargs="*", help=".npy files; one made-up sample where none is given")
    c.add_argument("--target", help="which of the artifact's targets (default: the first that runs here)")
    _add_devices(c)
    c.add_argument("--timeout", type=_count, default=300, help="seconds a profile may take on a device (default 300)")
    c.add_argument("--save", action="store_true", help="write the latencies into the artifact, for budgets")
    _add_file(c, "--sign", metavar="KEY", help=_KEY_HELP)

    c = add(
        "inspect",
        commands.inspect,
        "show the profiles of an artifact or of an exported folder",
        "t3c-compile inspect m.t3c",
        "t3c-compile inspect m-onnx --json",
    )
    _add_file(c, "artifact")

    c = add(
        "report",
        commands.report,
        "write a page about an artifact: budgets, accuracy and cost, certificates, kernels",
        "t3c-compile report m.t3c --measure -o report.html",
    )
    _add_file(c, "artifact")
    _add_file(c, "--baselines", help="JSON: [{name, accuracy (0 to 1), latency_ms, size_mb}, ...] to compare with")
    c.add_argument("--measure", action="store_true", help="time every kernel on this machine")
    _add_output(c, "page to write, such as report.html")

    add(
        "targets",
        commands.targets,
        "list the targets; a TOML file named by T3C_TARGETS adds more",
        "t3c-compile targets",
        "t3c-compile targets --json",
    )

    c = add(
        "demo",
        commands.demo,
        "train, lower and run the digits example, and show what came of it",
        "t3c-compile demo --model cnn",
    )
    c.add_argument("--model", action="append", choices=("cnn", "vit"), help="only this model (default both)")
    c.add_argument("--seed", type=int, default=0, help="of training (default 0)")
    _add_output(c, "folder for the artifacts (default build/demo)", default="build/demo")

    c = add(
        "completion",
        _completion,
        "print a script that completes commands and options in a shell",
        "t3c-compile completion bash > ~/.local/share/bash-completion/completions/t3c-compile",
        "t3c-compile completion zsh > ~/.zfunc/_t3c-compile",
    )
    c.add_argument("shell", choices=("bash", "zsh"))
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _add_model(command: argparse.ArgumentParser) -> None:
    _add_file(command, "model", help=_MODEL_HELP)
    command.add_argument("--input", action="append", default=[], help="example input: 'float32[1,3,224,224]' or .npy")
    command.add_argument("--data", help=DATA_HELP)
    command.add_argument("--conv", choices=("tucker2", "cp"), default="tucker2", help="form of k x k convolutions")
    command.add_argument("--keep", action="append", default=[], help="glob of layer names to leave alone")
    for name, what in (
        (
            "activations",
            "of linear layers; float32 (weight-only) is for decoding (default as in the checkpoint, else int8)",
        ),
        ("attention", "products of attention; int8 is faster (default as in the checkpoint, else float32)"),
        (
            "residuals",
            "images that are added around convolutions; int8 is faster (default as in the checkpoint, else float32)",
        ),
    ):
        command.add_argument(f"--{name}", choices=("int8", "float32"), help=what)


def _add_devices(command: argparse.ArgumentParser) -> None:
    """Devices that measure in this machine's place."""
    remote = command.add_mutually_exclusive_group()
    remote.add_argument("--rpc", metavar="HOST:PORT", action="append", help="measure on a TVM RPC server; repeatable")
    remote.add_argument("--tracker", metavar="HOST:PORT", help="measure on all devices of a TVM tracker with the key")
    command.add_argument("--key", default="", help="of the RPC servers")


def _add_file(command: argparse.ArgumentParser, *names: str, **options: Any) -> None:
    """An argument that shells complete with files and folders."""
    command.add_argument(*names, **options).complete = shtab.FILE  # type: ignore[attr-defined]


def _add_output(command: argparse.ArgumentParser, help: str, default: str | None = None) -> None:
    _add_file(command, "-o", "--output", required=default is None, default=default, help=help)


def _completion(arguments: argparse.Namespace) -> None:
    script = shtab.complete(build_parser(), arguments.shell)
    print(json.dumps({"shell": arguments.shell, "script": script}) if arguments.json else script)


if __name__ == "__main__":
    sys.exit(main())
