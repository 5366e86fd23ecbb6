"""T3C: one PyTorch checkpoint, many budgets. Importing this package imports neither torch nor the compiler."""
