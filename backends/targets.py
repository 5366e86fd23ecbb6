"""Targets: what code a device can run, its rank grid, its memory and how the cost of a layer is known.

They are data: ``targets.toml`` beside this file says what its keys mean, and a file of the user's own, named by the
environment variable ``T3C_TARGETS``, adds more. Imports neither torch nor the compiler, so that the command line can
list targets at once.
"""

import os
import platform
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from t3c_compile.backends import cpu
from t3c_compile.passes.errors import T3CError

OWN_TARGETS = "T3C_TARGETS"
_SHIPPED = Path(__file__).with_name("targets.toml")
# The first compute capability whose tensor cores multiply int8 in the shape of the kernels (mma m16n8k32).
LEAST_CUDA = 80
# The target x86_64 is the first of these that this machine is.
_HOST_LEVELS = ("x86_64-amx", "x86_64-vnni", "x86_64-avxvnni", "x86_64-v3")


class UnknownTargetError(T3CError):
    """No target has that name, or this host cannot be one; the message says which are known."""


class TargetFileError(T3CError):
    """A file of targets cannot be used; the message names the file, the target and the key."""


class UnsupportedTargetError(T3CError):
    """What was asked for is for targets of another kind."""


@dataclass(frozen=True)
class Target:
    """One device kind; ``targets.toml`` says what each field means.

    ``host`` is the CPU beside an accelerator, None for a CPU. ``simd``, ``tvm``, ``zig_triple`` and ``vela`` are empty
    where the kind has none.
    """

    name: str
    kind: str
    features: tuple[str, ...]
    rank_multiple: int
    bits: tuple[int, ...]
    accumulate: str
    memory_bytes: int
    peak_gops: float
    peak_gflops: float
    bandwidth_gbps: float
    cost: str
    roofline: str
    simd: str = ""
    host: "Target | None" = None
    tvm: Mapping[str, object] = field(default_factory=dict)
    zig_triple: str | None = None
    vela: Mapping[str, str] = field(default_factory=dict)

    @property
    def cost_source(self) -> str:
        """How a cost on this target comes about while nothing is measured."""
        return f"roofline: {self.roofline}"


_NUMBER = (int, float)
# A type, a tuple of types, or [type of the elements].
_KEYS: dict[str, Any] = {
    "kind": str,
    "features": [str],
    "rank_multiple": int,
    "bits": [int],
    "accumulate": str,
    "memory_bytes": int,
    "peak_gops": _NUMBER,
    "peak_gflops": _NUMBER,
    "bandwidth_gbps": _NUMBER,
    "cost": str,
    "roofline": str,
}
_KEYS_OF_KIND: dict[str, dict[str, Any]] = {
    "cpu": {"simd": str, "tvm": dict},
    "cuda": {"host": str, "tvm": dict},
    "ethos-u": {"host": str, "vela": dict},
}
_OPTIONAL = {"cpu": {"zig_triple": str}}
_KEYS_OF_TABLE: dict[str, dict[str, tuple[str, ...]]] = {
    "tvm": {"cpu": ("kind", "mtriple", "mcpu", "num-cores"), "cuda": ("kind", "arch", "max_threads_per_block")},
    "vela": {"ethos-u": ("accelerator", "system_config", "memory_mode")},
}
_CHOICES: dict[str, tuple[Any, ...]] = {
    "kind": tuple(_KEYS_OF_KIND),
    "simd": ("amx", "avx512vnni", "avxvnni", "avx2", "i8mm", "dotprod", "neon"),
    "bits": (4, 5, 6, 7, 8),
    "accumulate": ("int32",),
    "cost": ("measured", "vela"),
}


def read_targets(path: str | os.PathLike[str]) -> dict[str, Target]:
    """The targets that a TOML file describes, by name; their hosts are in the file or among the shipped targets.

    Raises:
        TargetFileError: the file cannot be read, or a descriptor in it is wrong.
    """
    file = Path(path)
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TargetFileError(f"cannot read targets from {file}: {error}") from error
    shipped = {} if file == _SHIPPED else _shipped()

    def refuse(name: str, wrong: str) -> TargetFileError:
        return TargetFileError(f"{file}: target [{name}]: {wrong}")

    for name, table in tables.items():
        wrong = _wrong(table)
        if wrong:
            raise refuse(name, wrong)
        if name in (*shipped, "x86_64"):
            raise refuse(name, "a shipped target has this name; choose another")
    found: dict[str, Target] = {}
    # CPUs first: they are the hosts.
    for name, table in sorted(tables.items(), key=lambda item: item[1]["kind"] != "cpu"):
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}
        if "host" in table:
            values["host"] = (shipped | found).get(table["host"])
            if values["host"] is None or values["host"].kind != "cpu":
                raise refuse(name, f"host: {table['host']!r} is no target of kind cpu")
        found[name] = Target(name, **values)
        links = "zig_triple" in table or machine(found[name]) == platform.machine()
        if shipped and table["kind"] == "cpu" and not links:
            raise refuse(
                name, f"zig_triple: is missing, and the compiler of this {platform.machine()} links for itself"
            )
    return {name: found[name] for name in tables}


def _wrong(table: Any) -> str | None:
    """What is wrong with a descriptor: the key, and why; None where nothing is."""
    if not isinstance(table, dict):
        return "it is not a table of keys"
    kind = table.get("kind")
    if kind not in _KEYS_OF_KIND:
        return f"kind: {kind!r} is not one of {', '.join(_KEYS_OF_KIND)}"
    required = _KEYS | _KEYS_OF_KIND[kind]
    allowed = required | _OPTIONAL.get(kind, {})
    for key in (*required, *table):
        if key not in table:
            return f"{key}: is missing"
        if key not in allowed:
            return f"{key}: is not a key of kind {kind}; there are {', '.join(allowed)}"
        wrong = _wrong_value(kind, key, table[key], allowed[key])
        if wrong:
            return f"{key}: {wrong}"
    return None


def _wrong_value(kind: str, key: str, value: Any, wanted: Any) -> str | None:
    listed = isinstance(wanted, list)
    values, types = (value, wanted[0]) if listed and isinstance(value, list) else ([value], wanted)
    if listed != isinstance(value, list) or not all(isinstance(v, types) and not isinstance(v, bool) for v in values):
        return f"{value!r} is of the wrong type"
    if listed and not values:
        return "is empty"
    for v in values:
        if key in _CHOICES and v not in _CHOICES[key]:
            return f"{v!r} is not one of {', '.join(map(str, _CHOICES[key]))}"
        if isinstance(v, int | float) and v <= 0:
            return f"{v} is not positive"
    if key == "bits" and value != sorted(set(value)):
        return f"{value} does not rise"
    missing = [name for name in _KEYS_OF_TABLE.get(key, {}).get(kind, ()) if name not in value]
    return f"{missing[0]} is missing" if missing else None


@cache
def _shipped() -> dict[str, Target]:
    return read_targets(_SHIPPED)


@cache
def _x86_64() -> Target | None:
    """The level that this machine has, with its cores and its memory; None where it has none."""
    has = cpu.features()
    level = next((_shipped()[name] for name in _HOST_LEVELS if has.issuperset(_shipped()[name].features)), None)
    if level is None:
        return None
    tvm = {**level.tvm, "num-cores": cpu.cores()}
    return replace(level, name="x86_64", tvm=tvm, memory_bytes=cpu.memory_bytes())


def _known() -> dict[str, Target]:
    host, own = _x86_64(), os.environ.get(OWN_TARGETS)
    return {**({"x86_64": host} if host else {}), **_shipped(), **(read_targets(own) if own else {})}


def list_targets() -> tuple[str, ...]:
    """Names of the known targets. Raises :class:`TargetFileError` where the user's file is wrong."""
    return tuple(_known())


def get_target(name: str) -> Target:
    """The target called ``name``; :class:`UnknownTargetError` (a ValueError) lists the known ones."""
    known = _known()
    if name in known:
        return known[name]
    if plain := re.fullmatch(r"cuda-sm_(\d{2,3})", name):
        return _plain_cuda(name, int(plain[1]))
    if name == "x86_64":
        raise UnknownTargetError(
            "target x86_64 describes the host, and this host has no AVX2; cross-compile for another target"
        )
    raise UnknownTargetError(
        f"unknown target {name!r}; known targets: {', '.join(known)}, cuda-sm_XX. Describe another in a TOML file, and "
        f"name the file in the environment variable {OWN_TARGETS}"
    )


def _plain_cuda(name: str, generation: int) -> Target:
    """Any NVIDIA GPU beside an x86-64 host, by its compute capability alone."""
    if generation < LEAST_CUDA:
        raise UnknownTargetError(
            f"target {name}: the kernels multiply int8 on tensor cores as sm_{LEAST_CUDA} and later do; lower for a CPU"
        )
    host = _shipped()["x86_64-v3"]
    shipped = [target for target in _shipped().values() if target.kind == "cuda" and target.host == host]
    arch = f"sm_{generation}"
    known = next((target for target in shipped if target.tvm["arch"] == arch), shipped[0])
    roofline = f"{known.roofline} of {known.name}: nothing is known of a plain {arch}"
    return replace(known, name=name, tvm={**known.tvm, "arch": arch}, roofline=roofline)


def host_target() -> Target:
    """The target that is this machine. Raises :class:`UnknownTargetError` where none is."""
    return get_target("arm64" if platform.machine() in ("aarch64", "arm64") else "x86_64")


def machine(target: Target) -> str:
    """The host's architecture as ``platform.machine()`` has it on Linux: ``x86_64`` or ``aarch64``."""
    return str((target.host or target).tvm["mtriple"]).partition("-")[0]


def require_cpu(target: Target) -> None:
    """Raise :class:`UnsupportedTargetError` where ``target`` is none: what is asked for is for CPUs alone."""
    if target.kind != "cpu":
        raise UnsupportedTargetError(
            f"target {target.name} is of kind {target.kind}: tuning and Relax modules are for a CPU alone; lower for "
            "it without them"
        )
