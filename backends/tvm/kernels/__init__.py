"""Scheduled TIR kernels, one file a family."""
