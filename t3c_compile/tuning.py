"""``tune``: the kernels of a model's profiles get the tile sizes that are measured fastest."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from t3c_compile.artifact import export_profiles
from t3c_compile.backends.targets import Target, get_target, machine, require_cpu
from t3c_compile.passes.errors import T3CError
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.profile import ProfileSet
from t3c_compile.progress import progress_bar
from t3c_compile.runtime import refusal

if TYPE_CHECKING:
    from t3c_compile.backends.tvm.tuning.records import RecordsFile
    from t3c_compile.backends.tvm.tuning.search import Standing

_TIMES = ("default_seconds", "seconds")


class TuningError(T3CError):
    """Tuning cannot begin; the message says what to do."""


def open_records(path: str | os.PathLike[str], target: Target, remote: bool = False) -> "RecordsFile":
    """The file of records of what ``target`` measures, here or on ``remote`` devices; made where there is none.

    Raises:
        UnsupportedTargetError: the target is no CPU.
        TuningError: the target does not run on this machine, and no device is named.
        RecordsError: the file is of another kind or CPU, or damaged.
    """
    require_cpu(target)
    reason = refusal({"machine": machine(target), "features": target.features})
    if not remote and reason is not None:
        raise TuningError(
            f"target {target.name} cannot be measured on this machine: {reason}. Name a device that runs it "
            "(--rpc HOST:PORT or --tracker HOST:PORT), or lower with the shipped records"
        )
    from t3c_compile.backends.tvm.tuning.records import RecordsFile, cpu_of

    return RecordsFile(Path(path), cpu_of(target, remote))


def tune(
    model: ElasticGraphModule,
    profiles: ProfileSet,
    target: Target | str,
    records: str | os.PathLike[str],
    example_inputs: tuple[Tensor, ...],
    minutes: float = 15.0,
    threads: int | None = None,
    rpc: Sequence[str] = (),
    tracker: str | None = None,
    key: str = "",
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Measure tile sizes for every kernel of ``profiles`` and add what was found to the file ``records``.

    ``lower(..., records=records)`` compiles with the fastest. Results never depend on tiles, only times do. Stopped
    or killed, it goes on where it was when called again with the same file; it ends early when no candidate is left.

    Args:
        example_inputs: what the graphs are traced with, as for ``transform``; a free batch is measured as 1.
        minutes: of measuring, after each kernel was measured as it is now. 0 only measures what is not in ``records``.
        threads: how many the kernels run on; all cores of the target unless given.
        rpc: ``HOST:PORT`` of TVM RPC servers that measure side by side instead of this machine, by their ``key``.
        tracker: ``HOST:PORT`` of a TVM RPC tracker, all of whose devices with that ``key`` measure. A device that is
            lost drops out, the others take up what it was at.

    Returns:
        A row a kernel, those with the most time first: its shape, calls in all profiles together, microseconds a call,
        GOP/s, that as a part of the peak measured on the same threads, the default's microseconds, the tiles, and
        whether these are the default's, shipped ones or tuned now.

    Raises:
        TuningError, RecordsError: as for :func:`open_records`.
        DeviceError: there is no device, or none is left; what was measured until then is recorded.
        UnknownTargetError, UnsupportedOpError: as for ``lower``.
    """
    wanted = get_target(target) if isinstance(target, str) else target
    file = open_records(records, wanted, bool(rpc or tracker))
    from t3c_compile.backends.tvm.farm.devices import find_devices
    from t3c_compile.backends.tvm.kernels.isa import isa_for
    from t3c_compile.backends.tvm.tuning.collect import measured_sizes, workloads_of
    from t3c_compile.backends.tvm.tuning.records import Tuned
    from t3c_compile.backends.tvm.tuning.runner import Runner
    from t3c_compile.backends.tvm.tuning.search import Search

    threads = threads or int(str(wanted.tvm["num-cores"]))
    devices = find_devices(rpc, tracker, key)
    shipped = Tuned(wanted, threads=threads)
    with ExitStack() as stack, progress_bar(progress) as bar:
        zero = bar.add_task("specialize", total=len(profiles.profiles))
        programs, store = export_profiles(model, profiles, example_inputs, lambda: bar.advance(zero))
        workloads = workloads_of(programs, isa_for(wanted))
        sizes = measured_sizes(programs)
        del programs, store
        if not workloads:
            return []
        runners = [stack.enter_context(Runner(wanted, threads, device)) for device in devices]
        search = Search(workloads, wanted, file, runners, threads, sizes, shipped.tiles)
        peak = search.peak()
        first = bar.add_task("kernels as they are", total=len(workloads))
        search.baseline(lambda number, count: bar.update(first, completed=number, total=count))
        second = bar.add_task("tune", total=60 * minutes)

        def show(elapsed: float) -> None:
            default, now = (sum(s.calls * getattr(s, what) for s in search.standings()) for what in _TIMES)
            gain = f"all profiles' kernels {1e3 * default:.4g} ms -> {1e3 * now:.4g} ms"
            bar.update(second, completed=elapsed, description=gain)

        search.run(60 * minutes, show)
        return [_row(standing, peak) for standing in search.standings()]


def _row(s: "Standing", peak: float) -> dict[str, Any]:
    rate = s.operations / s.seconds
    row = {"kernel": s.workload.key, "calls": s.calls, "us": 1e6 * s.seconds, "gops": rate / 1e9}
    row |= {"of_peak": rate / peak, "default_us": 1e6 * s.default_seconds}
    return row | {"tiles": "; ".join(map(str, s.tiles)) or None, "from": s.source}
