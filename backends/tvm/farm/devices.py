"""The devices that measure: this machine, RPC servers by their addresses, or all that a tracker has of one key."""

import json
import socket
import struct
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

from tvm import rpc
from tvm.rpc import base

from t3c_compile.passes.errors import T3CError

_CONNECT_SECONDS = 5.0


class DeviceError(T3CError):
    """Nothing can be measured; the message names the device, and holds what the measuring process wrote."""


@dataclass(frozen=True)
class Remote:
    """A TVM RPC server at ``address`` (``HOST:PORT``), or any device of the ``tracker`` there; by ``key``."""

    address: str
    key: str = ""
    tracker: bool = False

    def __str__(self) -> str:
        return f"a device with key {self.key!r} of the tracker at {self.address}" if self.tracker else self.address


def find_devices(servers: Sequence[str] = (), tracker: str | None = None, key: str = "") -> list[Remote | None]:
    """The devices at ``servers`` (each ``HOST:PORT``), or those with ``key`` at a ``tracker``; None is this machine.

    Raises:
        DeviceError: an address is none, a server or the tracker cannot be reached, a server has another key, or the
            tracker has no device with that key.
    """
    for address in (*servers, *([tracker] if tracker else [])):
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            raise DeviceError(f"{address!r} is no HOST:PORT")
    if tracker is None:
        for address in servers:
            _require_server(address, key)
        return [Remote(address, key) for address in servers] or [None]
    keys = _keys_at(tracker)
    if key not in keys:
        others = ", ".join(sorted(set(keys))) or "none"
        raise DeviceError(f"the tracker at {tracker} has no device with key {key!r} (keys: {others}): start one")
    return [Remote(tracker, key, tracker=True)] * keys.count(key)


def _require_server(address: str, key: str) -> None:
    """See that a server answers, and takes ``key``."""
    host, _, port = address.rpartition(":")
    # TVM's client waits for minutes, so the first to ask is one with no server's key, which is sent away. (A server
    # ends when a client that it let in leaves without a farewell.)
    nobody = b"client:nobody?"
    try:
        with socket.create_connection((host, int(port)), _CONNECT_SECONDS) as server:
            server.sendall(struct.pack("<ii", base.RPC_MAGIC, len(nobody)) + nobody)
            answer = server.recv(4)
    except (OSError, OverflowError) as error:
        raise DeviceError(
            f"the RPC server at {address} cannot be reached: {error}. Start it on the device with `python -m "
            f"tvm.exec.rpc_server --host 0.0.0.0 --port {port}`, or wait: one at work does not answer others"
        ) from error
    if answer != struct.pack("<i", base.RPC_CODE_MISMATCH):
        raise DeviceError(f"what listens at {address} is no TVM RPC server: name its port, or a --tracker")
    try:
        rpc.connect(host, int(port), key, session_timeout=_CONNECT_SECONDS)
    except RuntimeError as error:
        raise DeviceError(f"the RPC server at {address} does not take the key {key!r}: name its own (--key)") from error


def _keys_at(tracker: str) -> list[str]:
    """The key of every device that is registered."""
    host, _, port = tracker.rpartition(":")
    try:
        # TVM's client tries for a minute.
        socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
        with closing(rpc.connect_tracker(host, int(port))) as session:
            found = session.summary()["server_info"]
    except (OSError, OverflowError, RuntimeError, json.JSONDecodeError) as error:
        raise DeviceError(
            f"the tracker at {tracker} cannot be reached: {error}. Start one: `python -m tvm.exec.rpc_tracker --host "
            f"0.0.0.0 --port {port}`"
        ) from error
    return [str(info["key"]).removeprefix("server:") for info in found]
