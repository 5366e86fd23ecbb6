"""What tuning has measured: a file of JSON lines that only grows, and the tiles that lowering takes from it.

Not MetaSchedule's database: its records are traces of schedule primitives over a PrimFunc they start from, and these
kernels are emitted with their tiles, so there is no such PrimFunc; nor does it store what the default took beside.
"""

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import tvm

from t3c_compile.backends.targets import Target, machine
from t3c_compile.backends.tvm.kernels.tile import Tile, Tiles
from t3c_compile.backends.tvm.tuning.workload import Workload
from t3c_compile.passes.errors import T3CError

_SCHEMA = "t3c-compile tuning records, version 1"
SHIPPED = Path(__file__).with_name("records")
# Tiles that take more of the default's time than this are no gain: another run could find the opposite.
KEPT_BELOW = 0.98


class RecordsError(T3CError):
    """A file of tuning records that cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Record:
    """``seconds`` a call took with ``tiles`` and the default took in the same rounds, None where it failed."""

    key: str
    threads: int
    tiles: Tiles
    seconds: float | None
    default_seconds: float | None

    @property
    def ratio(self) -> float:
        """Of the default's time."""
        if self.seconds is None or self.default_seconds is None:
            return math.inf
        return self.seconds / self.default_seconds


def best(records: Sequence[Record]) -> Record | None:
    """The fastest of one workload and number of threads, the earlier of equals; the default unless it is a gain."""
    fastest = min(records, key=lambda r: r.ratio, default=None)
    if fastest is None or fastest.ratio < KEPT_BELOW:
        return fastest
    return next((r for r in records if not r.tiles), replace(fastest, tiles=(), seconds=fastest.default_seconds))


class RecordsFile:
    """Records at ``path``, measured on one CPU family, by workload and threads; :meth:`append` writes one for good.

    Raises:
        RecordsError: the file is of another kind, version or CPU, or a line of it is damaged. A last line without its
            end is what a killed process leaves, and is taken away.
    """

    def __init__(self, path: Path, cpu: str) -> None:
        self.path, self.cpu = path, cpu
        self.records: dict[tuple[str, int], list[Record]] = {}
        if path.exists():
            whole = _whole_lines(path)
            if whole < path.stat().st_size:
                os.truncate(path, whole)
        if path.exists() and path.stat().st_size:
            self.records, found = read(path)
            if found != cpu:
                raise RecordsError(f"{path} was measured on {found}, and this is {cpu}: name another file")
        else:
            self._write({"schema": _SCHEMA, "cpu": cpu})

    def append(self, record: Record) -> None:
        """Add ``record``; when this returns, it is on the disk."""
        self._write(_to_json(record))
        self.records.setdefault((record.key, record.threads), []).append(record)

    def _write(self, line: Mapping[str, Any]) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RecordsError(f"cannot write {self.path}: {error.strerror}") from error


def read(path: Path) -> tuple[dict[tuple[str, int], list[Record]], str]:
    """The records of a file by (key, threads), and the CPU family they were measured on."""
    try:
        with path.open("rb") as file:
            lines = file.read(_whole_lines(path)).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecordsError(f"cannot read tuning records from {path}: {error}") from error
    header = _parsed(lines[0]) if lines else None
    if not isinstance(header, dict) or header.get("schema") != _SCHEMA:
        raise RecordsError(f"{path} does not begin with the schema {_SCHEMA!r}: name another file, or tune anew")
    records: dict[tuple[str, int], list[Record]] = {}
    for number, line in enumerate(lines[1:], 2):
        try:
            fields = json.loads(line)
            record = Record(**{**fields, "tiles": tuple(Tile(*tile) for tile in fields["tiles"])})
        except (ValueError, TypeError, KeyError) as error:
            raise RecordsError(f"{path}, line {number} is damaged ({error}): delete the line") from error
        records.setdefault((record.key, record.threads), []).append(record)
    return records, str(header["cpu"])


def write_best(records: RecordsFile, path: Path) -> None:
    """Write the best record of every workload in ``records`` as a file of its own, in the order of keys."""
    lines: list[Mapping[str, Any]] = [{"schema": _SCHEMA, "cpu": records.cpu}]
    found = (best(group) for _, group in sorted(records.records.items()))
    lines += [_to_json(record) for record in found if record is not None]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


_WITH_AMX = ("sapphirerapids", "emeraldrapids", "graniterapids", "graniterapids-d", "diamondrapids")


def cpu_of(target: Target, remote: bool = False) -> str:
    """The CPU family as LLVM names it: this machine's where it can be of ``target``'s kind and is not ``remote``."""
    host = machine(target) == platform.machine() and not remote
    name = str(tvm.target.codegen.llvm_get_system_cpu() if host else target.tvm["mcpu"])
    # LLVM goes by a model number that virtual machines make up: what has AMX is this or later.
    return "sapphirerapids" if target.simd == "amx" and name not in _WITH_AMX else name


@cache
def _shipped(cpu: str) -> list[dict[tuple[str, int], list[Record]]]:
    """Shipped records, those of ``cpu`` first."""
    paths = sorted(SHIPPED.glob("*.jsonl"), key=lambda path: (path.stem != cpu, path.stem))
    return [read(path)[0] for path in paths]


def _whole_lines(path: Path) -> int:
    """Bytes of ``path`` up to the end of its last whole line."""
    return path.read_bytes().rfind(b"\n") + 1


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _to_json(record: Record) -> dict[str, Any]:
    return {**asdict(record), "tiles": [list(astuple(tile)) for tile in record.tiles]}


class Tuned:
    """The tiles to lower with: from ``own`` records where given, else from the shipped ones, else the defaults.

    Shipped records of the host's CPU family come first, then those of others: a tile found on another CPU with the same
    instructions is a better guess than none. ``threads``: how many the library will run on, by default all cores.
    """

    def __init__(self, target: Target, own: Path | None = None, threads: int | None = None) -> None:
        self._threads = threads or int(str(target.tvm["num-cores"]))
        self._layers = [read(own)[0] if own is not None else {}, *_shipped(cpu_of(target))]

    def tiles(self, workload: Workload) -> Tiles:
        """The tiles of ``workload``; none for the defaults."""
        found = self._find(workload.key)
        if found is None or not found.tiles:
            return ()
        products = workload.products({})
        if len(found.tiles) != len(products) or not all(p.fits(t) for p, t in zip(products, found.tiles, strict=True)):
            raise RecordsError(f"the recorded tiles {found.tiles} do not fit {found.key}: tune it anew")
        if found.threads == self._threads:
            return found.tiles
        # What is best in registers is so for any number of threads; a larger task may leave some without work.
        return tuple(
            replace(t, chunk=min(t.chunk, p.default.chunk)) for p, t in zip(products, found.tiles, strict=True)
        )

    def _find(self, key: str) -> Record | None:
        for layer in self._layers:
            counts = [threads for found, threads in layer if found == key]
            if counts:
                nearest = min(counts, key=lambda n: (abs(math.log(n / self._threads)), n))
                return best(layer[key, nearest])
        return None
