"""Work shared among devices, any of which may be lost."""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Condition
from typing import TypeVar

from t3c_compile.backends.tvm.farm.devices import DeviceError

_log = logging.getLogger(__name__)

Worker = TypeVar("Worker")
Job = TypeVar("Job")


def side_by_side(
    workers: list[Worker],
    state: Condition,
    take: Callable[[], Job | None],
    work: Callable[[Worker, Job], None],
    end: Callable[[Job, bool], None],
) -> None:
    """Have every worker do what ``take`` gives, one after the other, until it gives nothing and nobody is at work.

    A worker whose device is lost (``work`` raises :class:`DeviceError`) is taken out of ``workers``. ``end(job, lost)``
    is called after each. It and ``take`` are called with ``state`` held.

    Raises:
        DeviceError: the last device was lost.
    """
    busy = 0
    errors: list[DeviceError] = []

    def serve(worker: Worker) -> None:
        nonlocal busy
        while True:
            with state:
                # A device that is lost gives its job back: as long as others are busy, there may be more to do.
                while (job := take()) is None and busy:
                    state.wait()
                if job is None:
                    return
                busy += 1
            lost: DeviceError | None = None
            try:
                work(worker, job)
            except DeviceError as error:
                lost = error
            except BaseException:
                with state:
                    busy -= 1
                    state.notify_all()
                raise
            with state:
                busy -= 1
                if lost is not None:
                    errors.append(lost)
                    workers.remove(worker)
                end(job, lost is not None)
                state.notify_all()
            if lost is not None:
                _log.warning("a device is lost, %d are left: %s", len(workers), lost)
                return

    with ThreadPoolExecutor(max(1, len(workers))) as pool:
        for finished in [pool.submit(serve, worker) for worker in list(workers)]:
            finished.result()
    if errors and not workers:
        raise DeviceError(f"{errors[-1]}; no device is left") from errors[-1]
