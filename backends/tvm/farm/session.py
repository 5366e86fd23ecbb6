"""The measuring process's side: requests come in as JSON lines, answers go out.

It works on this machine, or on a device where ``python -m tvm.exec.rpc_server`` (or the same of TVM's C++ runtime)
runs. A device has a session for each request, which its server ends itself when it takes too long: code that hangs
costs no device. Each request is answered by two lines: that the device is there, and the answer.
"""

import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

sys.modules["torch"] = None  # type: ignore[assignment]  # TVM would load it, for nothing

from tvm import rpc  # noqa: E402


def serve(
    kind: str,
    address: str,
    key: str,
    answer: Callable[[Any, dict[str, Any]], Any],
    check: Callable[[Any], None] = lambda session: None,
) -> None:
    """Answer the requests of :class:`~t3c_compile.backends.tvm.farm.process.MeasuringProcess` until none comes.

    ``answer(session, request)``; null where it raises. ``check(session)`` ends the process where the device won't do.
    """
    open_session = _opener(kind, address, key)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        session = open_session(request["seconds"])
        check(session)
        print("connected", flush=True)
        found = None
        try:
            found = answer(session, request)
        except Exception as error:
            # What ends a session: code that crashes or hangs, or a device that is lost. Users are told the last line.
            traceback.print_exc()
            print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        del session
        print(json.dumps(found), flush=True)


def _opener(kind: str, address: str, key: str) -> Callable[[int], Any]:
    """What opens a session of at most so many seconds; ``kind`` is local, server or tracker."""
    if kind == "local":
        return lambda seconds: rpc.LocalSession()
    host, _, port = address.rpartition(":")
    if kind == "server":
        return lambda seconds: rpc.connect(host, int(port), key, session_timeout=seconds)
    # It waits until a device is free; the parent does not wait for ever.
    return lambda seconds: rpc.connect_tracker(host, int(port)).request(key, session_timeout=seconds, max_retry=1)
