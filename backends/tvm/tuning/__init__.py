"""Tile sizes found by measuring: what is tuned, in which order, how it is measured and where results are kept."""
