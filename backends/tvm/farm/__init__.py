"""Devices that measure: this machine, or boards over TVM's RPC."""
