"""ONNX: every profile as a file with int8 QDQ and INT4 weights, over one file of weights."""

from t3c_compile.backends.onnx.export import OnnxError, export_onnx, read_profiles, require_onnx

__all__ = ["OnnxError", "export_onnx", "read_profiles", "require_onnx"]
