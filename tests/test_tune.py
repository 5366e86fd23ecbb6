"""Tuning: no tile changes a result, records outlive a killed process, and lowering takes the tiles they name."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from kernel_cases import build_cases, calls_for, compile_module, run_calls
from nets import Mlp, packed
from tvm import rpc
from tvm.runtime import vm as runtime
from tvm.tirx.script.builder import ir as T

import t3c_compile
import t3c_compile.passes.ops  # registers the ops
from t3c_compile import commands
from t3c_compile.backends.targets import get_target
from t3c_compile.backends.tvm.build import Library, build_library, link
from t3c_compile.backends.tvm.farm.devices import DeviceError, Remote
from t3c_compile.backends.tvm.kernels.emit import prim_func, store
from t3c_compile.backends.tvm.kernels.isa import isa_for
from t3c_compile.backends.tvm.kernels.linear import LinearSpec
from t3c_compile.backends.tvm.kernels.product import SPARE_ROWS
from t3c_compile.backends.tvm.kernels.tile import Tile, Tiles
from t3c_compile.backends.tvm.tuning.peak import peak, peak_arguments
from t3c_compile.backends.tvm.tuning.records import (
    SHIPPED,
    Record,
    RecordsError,
    RecordsFile,
    Tuned,
    best,
    read,
    write_best,
)
from t3c_compile.backends.tvm.tuning.runner import Runner
from t3c_compile.backends.tvm.tuning.search import Search
from t3c_compile.backends.tvm.tuning.workload import Workload
from t3c_compile.cli import build_parser, main

TARGET = get_target("x86_64")
ISA = isa_for(TARGET)
CASES = build_cases()
# Of a product's candidates, each n-th is run where others share its code.
EVERY = {
    "int8_linear_": 1,
    "int8_conv2d_": 2,
    "svd_linear_": 4,
    "tucker2_conv2d_": 2,
    "svd_conv2d_": 8,
    "cp_conv2d_": 8,
}


def choices(workload: Workload) -> list[Tiles]:
    """Tiles so that every candidate of every product is in one of them."""
    products = workload.products({})
    columns = [product.candidates(1) for product in products]
    return [
        tuple(product.default if tile is None else tile for tile, product in zip(row, products, strict=True))
        for row in zip_longest(*columns)
    ]


@pytest.mark.parametrize("name", EVERY)
def test_no_tile_changes_a_result(name: str, tmp_path: Path) -> None:
    case = max((c for c in CASES if c.call.name.startswith(name) and c.spec), key=lambda c: c.call.args[0].size)
    workload = Workload(ISA, case.spec)
    tiles = choices(workload)
    tiles = tiles[:: max(1, min(EVERY[name], len(tiles) // 4))]
    assert len(tiles) >= 4
    kernels = {f"{case.call.name}_{i}": workload.kernel(t) for i, t in enumerate(tiles)}
    functions = {n: k.with_attr("global_symbol", n) for n, k in kernels.items()}
    link(compile_module(functions, TARGET), TARGET, tmp_path / "tiles.so")
    (call,) = calls_for([case], TARGET.name)
    calls = [replace(call, name=n) for n in kernels]
    for which, result in zip(tiles, run_calls(tmp_path / "tiles.so", calls), strict=True):
        np.testing.assert_array_equal(result, case.expected, err_msg=str(which))


class TwoLayers(torch.nn.Module):
    """``int8_linear`` and ``svd_linear`` on one input."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        for name, shape in (("weight", (70, 40)), ("v", (24, 40)), ("u", (24, 70))):
            self.register_buffer(name, torch.randint(-119, 120, shape, generator=random, dtype=torch.int8))
        for name, size in (("scale", 70), ("mid", 24), ("gain", 70)):
            self.register_buffer(name, 0.001 + 0.01 * torch.rand(size, generator=random))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = torch.ops.t3c.quantize_int8(x, 0.03, 4)
        y = torch.ops.t3c.int8_linear(q, self.weight, self.scale, None, 0.03, 4, 8)
        return y + torch.ops.t3c.svd_linear(q, self.v, self.u, self.mid, self.gain, None, 0.03, 4, 0.3, 20, 8)


def build(folder: Path, name: str, records: Path | None) -> tuple[Library, np.ndarray[Any, Any]]:
    """The library of :class:`TwoLayers` with ``records``, and what it gives for seeded inputs."""
    model = TwoLayers().eval()
    x = torch.randn(3, 11, 40, generator=torch.Generator().manual_seed(1))
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(model, (x,), dynamic_shapes=shapes)
    library = build_library({"main": program}, TARGET, folder / name, records)
    machine = runtime.VirtualMachine(tvm.runtime.load_module(str(library.path)), tvm.cpu())
    state = model.state_dict()
    tensors = packed(machine, library, state)
    return library, machine["main"](tvm.runtime.tensor(x.numpy()), tensors).numpy()


def linear_kernels(library: Library) -> list[str]:
    return sorted(how for how in library.kernels.values() if "_linear" in how)


def test_lowering_takes_the_recorded_tiles(tmp_path: Path) -> None:
    """Those found fastest, with the same results bit for bit; and the library says which."""
    threads = int(str(TARGET.tvm["num-cores"]))
    first = f"{ISA.name} int8_linear rows=n*11 40->70"
    second = f"{ISA.name} svd_linear rank=20 rows=n*11 40->70"
    file = RecordsFile(tmp_path / "mine.jsonl", "test")
    file.append(Record(first, threads, (), 2e-6, 2e-6))
    file.append(Record(first, threads, (Tile(3, 2, 9),), 1.5e-6, 2e-6))
    file.append(Record(first, threads, (Tile(5, 1, 10),), 1e-6, 2e-6))
    file.append(Record(first, threads, (Tile(7, 1, 14),), None, None))
    # A gain too small to be one.
    file.append(Record(second, threads, (Tile(2, 2, 8), Tile(3, 1, 6)), 1.97e-6, 2e-6))
    plain, expected = build(tmp_path, "plain.so", None)
    tuned, found = build(tmp_path, "tuned.so", file.path)
    assert linear_kernels(plain) == ["kernel template: int8_linear", "kernel template: svd_linear"]
    assert linear_kernels(tuned) == [
        "kernel template: int8_linear, tuned 5x1 in 10",
        "kernel template: svd_linear",
    ]
    np.testing.assert_array_equal(found, expected)
    again, _ = build(tmp_path, "again.so", file.path)
    assert again.kernels == tuned.kernels


def test_records_of_other_threads_keep_registers_alone(tmp_path: Path) -> None:
    """The nearest number of threads; a chunk no larger than the default's, so that no thread is left without work."""
    workload = Workload(ISA, LinearSpec((500,), 64, 64, 8))
    file = RecordsFile(tmp_path / "mine.jsonl", "test")
    file.append(Record(workload.key, 2, (Tile(3, 2, 500),), 1e-6, 2e-6))
    file.append(Record(workload.key, 64, (Tile(2, 2, 50),), 1e-6, 2e-6))
    (default,) = workload.products({})
    for threads, tile in ((2, Tile(3, 2, 500)), (4, Tile(3, 2, default.default.chunk)), (40, Tile(2, 2, 50))):
        assert Tuned(TARGET, file.path, threads).tiles(workload) == (tile,)
    file.append(Record(workload.key, 2, (Tile(99, 2, 99),), 1e-7, 2e-6))
    with pytest.raises(RecordsError, match=r"do not fit .* tune it anew"):
        Tuned(TARGET, file.path, 2).tiles(workload)


_LOWER = ["lower", "test_tune:net", "--data", "test_tune:data", "--target", "x86_64"]


def test_records_of_another_cpu_leave_the_choice_to_multiply_adds(tmp_path: Path) -> None:
    """A file that a board was tuned into serves its own target; the others are lowered beside it as without a file."""
    path = tmp_path / "board.jsonl"
    RecordsFile(path, "cortex-a76").append(Record("k", 1, (), 1e-6, 1e-6))
    arguments = build_parser().parse_args([*_LOWER, "--records", str(path), "-o", str(tmp_path / "m.t3c")])
    x = torch.randn(4, 64)
    times, notes = commands._times(arguments, t3c_compile.transform(Mlp().eval(), (x,)), (x,), [TARGET])
    assert times == {}
    assert [note for note in notes if "chosen without times on x86_64" in note and "measured on cortex-a76" in note]


def test_the_first_of_equals_is_best() -> None:
    records = [Record("k", 1, (Tile(r, 1, 8),), 1e-6, 2e-6) for r in (3, 2, 4)]
    assert best(records) == records[0]
    failed = best([Record("k", 1, (Tile(2, 1, 8),), None, None)])
    assert failed is not None
    assert failed.tiles == ()
    assert best([]) is None


def test_a_record_cut_short_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    file = RecordsFile(path, "test")
    file.append(Record("k", 1, (), 1e-6, 1e-6))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": "k", "threa')
    assert read(path)[0] == file.records
    assert RecordsFile(path, "test").records == file.records
    assert path.read_bytes() == whole
    path.write_bytes(whole[:20])
    assert RecordsFile(path, "test").records == {}
    write_best(file, tmp_path / "best.jsonl")
    assert read(tmp_path / "best.jsonl")[0] == file.records


def test_files_that_are_no_records_of_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"schema": "something else", "cpu": "test"}\n')
    with pytest.raises(RecordsError, match=r"does not begin with the schema .* name another file, or tune anew"):
        RecordsFile(path, "test")
    path.unlink()
    RecordsFile(path, "test").append(Record("k", 1, (), 1e-6, 1e-6))
    with pytest.raises(RecordsError, match="was measured on test, and this is other: name another file"):
        RecordsFile(path, "other")
    path.write_text(path.read_text() + '{"key": 3}\n')
    with pytest.raises(RecordsError, match=r"line 3 is damaged .* delete the line"):
        RecordsFile(path, "test")
    with pytest.raises(RecordsError, match="cannot read tuning records"):
        Tuned(TARGET, tmp_path / "gone.jsonl")


def test_sizes_in_expressions_are_measured_whole() -> None:
    """A batch joined with another dimension is one expression, and a kernel knows it by a name."""
    workload = Workload(ISA, LinearSpec(("T.int64(7)*batch",), 16, 32, 8))
    assert [shape for shape, _ in workload.arguments({"batch": 2})][::4] == [(14, 16), (14, 32)]
    assert workload.operations({"batch": 2}) == 2 * 14 * 16 * 32


def test_every_shipped_record_fits() -> None:
    for path in SHIPPED.glob("*.jsonl"):
        records, cpu = read(path)
        assert cpu == path.stem
        assert all(len(group) == 1 and group[0].ratio <= 1 for group in records.values())
        tiles = [tile for (record,) in records.values() for tile in record.tiles]
        assert all(1 <= tile.rows <= SPARE_ROWS and tile.vectors >= 1 and tile.chunk >= 1 for tile in tiles)


class Simulated(Runner):
    """A runner whose times follow from the tiles: ``seconds(name of the kernel's schedule)``; none where it is 0."""

    def __init__(self, seconds: Callable[[str], float]) -> None:
        self._seconds = seconds
        self._kernels: dict[str, str] = {}
        self.measured: list[str] = []

    def compile(self, kernels: Mapping[str, tvm.tirx.PrimFunc]) -> Path:
        self._kernels = {name: str(kernel.attrs["t3c.schedule"]) for name, kernel in kernels.items()}
        return Path()

    def measure(self, library: Path, functions: Sequence[str], arguments: Any, rounds: int) -> Any:
        times = [self._seconds(self._kernels[name]) for name in functions]
        if 0.0 in times:
            return None
        self.measured += [self._kernels[name] for name in functions[1:]]
        return np.array([times] * rounds)


# Two to search, of which the first is there at two widths.
WORKLOADS = {
    Workload(ISA, LinearSpec((30,), 64, 96, 8, max_rank=32, rank=32)): 2,
    Workload(ISA, LinearSpec((30,), 64, 96, 4, max_rank=48, rank=32)): 1,
    Workload(ISA, LinearSpec(("s0", 7), 64, 96, 8)): 1,
}


def search(path: Path, runner: Runner, seconds: float = 1e9) -> Search:
    """A finished search of ``WORKLOADS``."""
    file = RecordsFile(path, "test")
    found = Search(WORKLOADS, TARGET, file, [runner], 1, {"s0": 4}, lambda _: ())
    found.baseline(lambda number, count: None)
    found.run(seconds, lambda elapsed: None)
    return found


def test_search_finds_the_best_and_goes_on_where_it_was(tmp_path: Path) -> None:
    defaults = {str(product.default) for workload in WORKLOADS for product in workload.products({"s0": 4})}

    def seconds(how: str) -> float:
        """Fewer rows are better; three and four vectors crash where they are not the default."""
        if "tuned" not in how:
            return 1e-5
        tiles = how.partition("tuned ")[2].split("; ")
        if any(re.search("x[34] in", tile) and tile not in defaults for tile in tiles):
            return 0.0
        return sum(2e-7 * int(tile.partition("x")[0]) for tile in tiles) / len(tiles)

    whole = search(tmp_path / "whole.jsonl", Simulated(seconds))
    standings = whole.standings()
    # Layers of one shape are tuned once, whatever their bits.
    assert sorted(s.calls for s in standings) == [1, 3]
    for standing in standings:
        assert standing.source == "tuned"
        assert [tile.rows for tile in standing.tiles] == [
            min(t.rows for t in product.candidates(1) if t.vectors not in (3, 4))
            for product in standing.workload.products({"s0": 4})
        ]
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    failed = [line for line in lines if '"seconds": null' in line]
    assert failed

    for kept in (1, 2, len(lines) // 2, len(lines)):
        path = tmp_path / f"{kept}.jsonl"
        path.write_text("".join(lines[:kept]))
        runner = Simulated(seconds)
        again = search(path, runner)
        assert again.standings() == standings
        assert sorted(path.read_text().splitlines(keepends=True)) == sorted(lines)
        assert not runner.measured or kept < len(lines)


def test_a_crash_or_a_hang_ends_the_measuring_process_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("t3c_compile.backends.tvm.tuning.runner._MEASURE_SECONDS", 3.0)

    def kernel(body: Callable[[Any], None]) -> tvm.tirx.PrimFunc:
        with prim_func("f") as function:
            (y,) = function.args(y=((16,), "int32"))
            body(y)
        return function.func

    def spin(y: Any) -> None:
        with T.While(y[0] < 200):
            store(y, 0, y[0] * 0, 1)

    kernels = {
        "fine": kernel(lambda y: store(y, 0, y[0] + 1, 1)),
        "crash": kernel(lambda y: T.evaluate(T.call_extern("int32", "abort"))),
        "hang": kernel(spin),
    }
    with Runner(TARGET, 1) as runner:
        library = runner.compile(kernels)
        arguments = [((16,), "int32")]
        for name in ("crash", "hang"):
            assert runner.measure(library, ["fine", name], arguments, 2) is None
            found = runner.measure(library, ["fine"], arguments, 2)
            assert found is not None
            assert found.shape == (2, 1)


def test_measuring_on_an_rpc_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_NUM_THREADS", "1")
    server = rpc.Server(host="127.0.0.1", key="device", silent=True)
    try:
        with Runner(TARGET, 1, Remote(f"127.0.0.1:{server.port}", "device")) as runner:
            found = runner.measure(runner.compile({"peak": peak(ISA)}), ["peak"], peak_arguments(ISA), 3)
            assert found is not None
            assert found.shape == (3, 1)
        with (
            Runner(TARGET, 2, Remote(f"127.0.0.1:{server.port}", "device")) as runner,
            pytest.raises(DeviceError, match="runs 1 threads, not 2: start its RPC server with TVM_NUM_THREADS=2"),
        ):
            runner.measure(Path("never.so"), [], [], 1)
    finally:
        server.terminate()
    with (
        Runner(TARGET, 1, Remote(f"127.0.0.1:{server.port}", "device")) as runner,
        pytest.raises(DeviceError, match="does not answer"),
    ):
        runner.measure(Path("never.so"), [], [], 1)


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return Mlp()


def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    xs = [torch.randn(32, 64) for _ in range(2)]
    return [(x, (x.sum(1) > 0).long()) for x in xs]


_COMMAND = [
    "tune",
    "test_tune:net",
    "--input",
    "float32[4,64]",
    "--data",
    "test_tune:data",
    "--profiles",
    "2",
    "--json",
]


def test_tune_goes_on_after_kill(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was recorded stays as it is, nothing is measured twice, and lowering reads the file."""
    path = tmp_path / "records.jsonl"
    command = [*_COMMAND, "--records", str(path), "--threads", "1"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    process = subprocess.Popen([sys.executable, "-m", "t3c_compile.cli", *command], env=environment)
    while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < 9):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = path.read_bytes()
    path.write_bytes(before + b'{"key": "avx')
    before = before[: before.rfind(b"\n") + 1]

    snapped = commands._snap(build_parser().parse_args(command), [TARGET], measure=True)
    monkeypatch.setattr(commands, "_snap", lambda *_, **__: snapped)
    assert main(command) == 0
    rows = json.loads(capsys.readouterr().out)
    after = path.read_bytes()
    assert after.startswith(before)
    assert len(after) > len(before)
    records = [record for group in read(path)[0].values() for record in group]
    assert len({(record.key, record.tiles) for record in records}) == len(records)
    # The others are layers at ranks that no profile has: the profiles were chosen by their times.
    assert {row["kernel"] for row in rows} < {record.key for record in records}
    assert all(row["us"] > 0 and row["gops"] > 0 and row["of_peak"] > 0 for row in rows)
    assert all((row["tiles"] is None) == (row["from"] == "default") for row in rows)

    assert main([*command, "--report"]) == 0
    reported = json.loads(capsys.readouterr().out)
    assert [row["us"] for row in reported] == [row["us"] for row in rows]
    assert path.read_bytes() == after


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "cortex-a76"], "target cortex-a76 cannot be measured on this machine: it is for aarch64"),
        (["--target", "z80"], "unknown target 'z80'"),
        ([], "does not begin with the schema"),
    ],
)
def test_what_is_wrong_shows_at_once(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text("something else\n")
    assert main([*_COMMAND, "--records", str(path), *arguments]) == 1
    assert message in json.loads(capsys.readouterr().err.splitlines()[-1])["message"]
    assert path.read_text() == "something else\n"
