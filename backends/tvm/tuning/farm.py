"""The devices that measure: this machine, RPC servers by their addresses, or all that a tracker has of one key."""

import json
import socket
from collections.abc import Sequence
from contextlib import closing

from tvm import rpc

from t3c_compile.backends.tvm.tuning.runner import DeviceError, Remote

_CONNECT_SECONDS = 5.0


def find_devices(servers: Sequence[str] = (), tracker: str | None = None, key: str = "") -> list[Remote | None]:
    """The devices at ``servers`` (each ``HOST:PORT``), or those with ``key`` at a ``tracker``; None is this machine.

    Raises:
        DeviceError: an address is none, or the tracker cannot be reached or has no device with that key.
    """
    for address in (*servers, *([tracker] if tracker else [])):
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            raise DeviceError(f"{address!r} is no HOST:PORT")
    if tracker is None:
        return [Remote(address, key) for address in servers] or [None]
    keys = _keys_at(tracker)
    if key not in keys:
        others = ", ".join(sorted(set(keys))) or "none"
        raise DeviceError(f"the tracker at {tracker} has no device with key {key!r} (keys: {others}): start one")
    return [Remote(tracker, key, tracker=True)] * keys.count(key)


def _keys_at(tracker: str) -> list[str]:
    """The key of every device that is registered."""
    host, _, port = tracker.rpartition(":")
    try:
        # TVM's client tries for a minute.
        socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
        with closing(rpc.connect_tracker(host, int(port))) as session:
            found = session.summary()["server_info"]
    except (OSError, RuntimeError, json.JSONDecodeError) as error:
        raise DeviceError(f"the tracker at {tracker} cannot be reached: {error}") from error
    return [str(info["key"]).removeprefix("server:") for info in found]
