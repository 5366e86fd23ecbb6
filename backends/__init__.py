"""Lowering of specialized graphs to machines."""
