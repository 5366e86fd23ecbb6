"""The search: which tiles are measured next, and what is kept."""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from t3c_compile.backends.targets import Target
from t3c_compile.backends.tvm.farm.devices import DeviceError
from t3c_compile.backends.tvm.farm.side_by_side import side_by_side
from t3c_compile.backends.tvm.kernels.emit import Sizes
from t3c_compile.backends.tvm.kernels.tile import Tiles
from t3c_compile.backends.tvm.tuning.peak import peak, peak_arguments, peak_operations
from t3c_compile.backends.tvm.tuning.records import KEPT_BELOW, Record, RecordsFile, best
from t3c_compile.backends.tvm.tuning.runner import Runner
from t3c_compile.backends.tvm.tuning.workload import Workload

_log = logging.getLogger(__name__)

_BATCH = 6  # candidates a library: compiling one costs as much as linking
_ROUNDS, _ROUNDS_OF_WINNERS = 15, 45
# Other programs only add time, and the rounds they leave alone compare well; on a busy machine medians let candidates
# win that another run found slower.
_QUANTILE = 0.2


@dataclass(frozen=True)
class Standing:
    """How a workload stands: ``seconds`` is what its best tiles take, ``calls`` how often all profiles call it.

    ``source``: of the tiles, ``default``, ``shipped`` or ``tuned``.
    """

    workload: Workload
    calls: int
    operations: int
    default_seconds: float
    seconds: float
    tiles: Tiles
    source: str


class Search:
    """Tunes ``workloads`` (with how often each is called) on ``threads`` threads into ``records``.

    Each of ``runners`` measures another workload beside the others, which is fair since a tile is compared with the
    default in the same rounds on the same device. A runner whose device is lost drops out: what it was at is recorded
    by nobody, and so the others take it up.

    For each workload: the default and the shipped tiles, then one product after another, its candidates in the order of
    their cost model with the other products at their best. It is always the turn of the workload with the most time
    for each batch of candidates it has had. What ``records`` holds is not measured again, so that a search that was
    killed goes on.
    """

    def __init__(
        self,
        workloads: Mapping[Workload, int],
        target: Target,
        records: RecordsFile,
        runners: Sequence[Runner],
        threads: int,
        sizes: Sizes,
        shipped: Callable[[Workload], Tiles],
    ) -> None:
        calls: dict[str, int] = defaultdict(int)
        first: dict[str, Workload] = {}
        for workload, count in workloads.items():
            calls[workload.key] += count
            first.setdefault(workload.key, workload)
        self._records, self._runners = records, list(runners)
        # Guards the records and who is at which task. TVM compiles in one thread at a time.
        self._state, self._compiler = threading.Condition(), threading.Lock()
        self._busy: set[int] = set()
        self._tasks = [
            _Task(workload, calls[key], threads, sizes, shipped(workload)) for key, workload in first.items()
        ]
        self._threads, self._isa = threads, self._tasks[0].workload.isa if self._tasks else None
        self._target = target

    def baseline(self, done: Callable[[int, int], None]) -> None:
        """Measure what every workload takes now, before any candidate; ``done(workloads measured, of how many)``.

        Raises:
            DeviceError: no device is left, or a kernel does not run on it as it is.
        """

        def missing(task: _Task) -> list[Tiles]:
            return [tiles for tiles in ((), *task.seeds) if tiles not in task.known(self._records)]

        def next_job() -> _Job | None:
            waiting = [task for task in self._idle() if missing(task)]
            return (waiting[0], missing(waiting[0])) if waiting else None

        def show() -> None:
            done(sum(not missing(task) for task in self._tasks), len(self._tasks))

        show()
        self._side_by_side(next_job, show)

    def run(self, seconds: float, done: Callable[[float], None]) -> None:
        """Measure candidates until none is left or ``seconds`` are over; ``done(seconds so far)`` after each batch.

        Raises:
            DeviceError: no device is left before that.
        """
        start = time.monotonic()

        def next_job() -> _Job | None:
            waiting = [task for task in self._idle() if task.proposals(self._records)]
            if not waiting or time.monotonic() >= start + seconds:
                return None
            task = max(waiting, key=lambda task: task.calls * task.standing(self._records).seconds / (1 + task.batches))
            task.batches += 1
            return task, task.proposals(self._records)[: 1 if task.losses else _BATCH]

        self._side_by_side(next_job, lambda: done(time.monotonic() - start))

    def _idle(self) -> list["_Task"]:
        return [task for task in self._tasks if id(task) not in self._busy]

    def _side_by_side(self, next_job: "Callable[[], _Job | None]", done: Callable[[], None]) -> None:
        """Measure what ``next_job`` gives on all devices until it gives nothing; ``done`` after each."""

        def take() -> "_Job | None":
            job = next_job()
            if job is not None:
                self._busy.add(id(job[0]))
            return job

        def end(job: "_Job", lost: bool) -> None:
            self._busy.discard(id(job[0]))
            if lost:
                self._suspect(*job)
            else:
                done()

        try:
            side_by_side(self._runners, self._state, take, lambda runner, job: self._measure(runner, *job), end)
        except DeviceError as error:
            raise DeviceError(f"{error}, what was measured is recorded") from error

    def standings(self) -> list[Standing]:
        """All workloads, those that take the most time first; :meth:`baseline` must have run."""
        found = [task.standing(self._records) for task in self._tasks]
        return sorted(found, key=lambda s: -s.calls * s.seconds)

    def peak(self) -> float:
        """Operations a second that one core reaches on registers alone, times the threads."""
        assert self._isa is not None
        found = None
        for runner in list(self._runners):
            library = runner.compile({"peak": peak(self._isa)})
            try:
                found = runner.measure(library, ["peak"], peak_arguments(self._isa), _ROUNDS)
            except DeviceError as error:
                if len(self._runners) == 1:
                    raise
                _log.warning("a device is lost: %s", error)
                self._runners.remove(runner)
            else:
                break
        if found is None:
            raise DeviceError(f"the dot product of {self._target.name} does not run on the device")
        return self._threads * peak_operations(self._isa) / float(np.min(found))

    def _measure(self, runner: Runner, task: "_Task", batch: Sequence[Tiles]) -> None:
        """Measure ``batch`` beside the default and record it; what looks best is measured again, and longer."""
        names = {f"candidate{i}": tiles for i, tiles in enumerate(batch) if tiles}
        with self._compiler:
            kernels = {name: task.workload.kernel(tiles) for name, tiles in {"default": (), **names}.items()}
            library = runner.compile(kernels)

        def times(some: Sequence[str], rounds: int) -> dict[str, tuple[float, float]] | None:
            """By name: seconds, and that as a part of the default's."""
            found = runner.measure(library, ["default", *some], task.arguments, rounds)
            if found is None:
                return None
            seconds = [float(s) for s in np.quantile(found, _QUANTILE, axis=0)]
            return {name: (s, s / seconds[0]) for name, s in zip(["default", *some], seconds, strict=True)}

        found = times(list(names), _ROUNDS)
        if found is None:
            # One of them ends the process: each by itself, to find which.
            single = {name: times([name], _ROUNDS) for name in names}
            alone = times([], _ROUNDS)
            if alone is None:
                raise DeviceError(f"the kernel {task.workload.key} does not run on the device, with default tiles too")
            found = {name: (np.inf, np.inf) if result is None else result[name] for name, result in single.items()}
            found |= alone
        if () in batch:
            self._record(task.record((), *found["default"]))
        known = best(list(task.known(self._records).values()))
        bar = min(KEPT_BELOW, known.ratio if known else 1.0)
        for name in sorted(names, key=lambda name: found[name][1]):
            seconds, ratio = found[name]
            if ratio < bar:
                again = times([name], _ROUNDS_OF_WINNERS)
                if again is not None:
                    seconds, ratio = again[name]
                    bar = min(bar, ratio)
            self._record(task.record(names[name], seconds, ratio))

    def _suspect(self, task: "_Task", batch: Sequence[Tiles]) -> None:
        """A device was lost at ``batch``. A candidate at which two were lost has failed, or it would take them all."""
        task.losses += 1
        if task.losses > 1 and len(batch) == 1 and batch[0] and () in task.known(self._records):
            self._record(task.record(batch[0], np.inf, np.inf))

    def _record(self, record: Record) -> None:
        with self._state:
            self._records.append(record)


_Job = tuple["_Task", Sequence[Tiles]]


class _Task:
    """One workload on its way through its candidates."""

    def __init__(self, workload: Workload, calls: int, threads: int, sizes: Sizes, shipped: Tiles) -> None:
        self.workload, self.calls = workload, calls
        self.batches = self.losses = 0
        self.seeds = [shipped] if shipped else []
        self.arguments = workload.arguments(sizes)
        self._operations, self._threads = workload.operations(sizes), threads
        products = workload.products(sizes)
        self._defaults = tuple(product.default for product in products)
        self._candidates = [product.candidates(threads) for product in products]
        self._order = sorted(range(len(products)), key=lambda i: -products[i].multiply_adds)

    def known(self, records: RecordsFile) -> dict[Tiles, Record]:
        return {record.tiles: record for record in records.records.get((self.workload.key, self._threads), ())}

    def record(self, tiles: Tiles, seconds: float, ratio: float) -> Record:
        if not np.isfinite(seconds):
            return Record(self.workload.key, self._threads, tiles, None, None)
        # The ratio is what was measured side by side; the default's time follows from it.
        return Record(self.workload.key, self._threads, tiles, seconds, seconds / ratio)

    def proposals(self, records: RecordsFile) -> list[Tiles]:
        """The tiles to measure next, in order: the rest of the first product that has any.

        Worked out from the records alone, so that a search that goes on proposes what the one before did.
        """
        known = self.known(records)
        seen = [known[tiles] for tiles in ((), *self.seeds)]
        for product in self._order:
            found = best(seen)
            start = found.tiles if found is not None and found.tiles else self._defaults
            wanted = [(*start[:product], tile, *start[product + 1 :]) for tile in self._candidates[product]]
            missing = [tiles for tiles in wanted if tiles not in known and tiles != self._defaults]
            if missing:
                return missing
            seen += [known[tiles] for tiles in wanted if tiles != self._defaults]
        return []

    def standing(self, records: RecordsFile) -> Standing:
        known = self.known(records)
        found = best(list(known.values()))
        assert found is not None
        assert found.seconds is not None
        default = known[()].seconds
        assert default is not None
        # As parts of one default's time: runs at other times had other clocks.
        seconds = default * found.ratio if found.tiles else default
        source = "default" if not found.tiles else "shipped" if found.tiles in self.seeds else "tuned"
        return Standing(self.workload, self.calls, self._operations, default, seconds, found.tiles, source)
