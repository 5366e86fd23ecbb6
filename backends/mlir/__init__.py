"""MLIR: every profile as a module of ATen, Linalg, TOSA or StableHLO, through torch-mlir."""

from t3c_compile.backends.mlir.export import DIALECTS, MlirError, export_mlir, lower_program, require_mlir, to_mlir

__all__ = ["DIALECTS", "MlirError", "export_mlir", "lower_program", "require_mlir", "to_mlir"]
