"""Arm Ethos-U: what an NPU runs of a profile, as TOSA 1.0 graphs compiled by vela; the rest is left to its host."""
