"""Lowering through Apache TVM Relax."""
