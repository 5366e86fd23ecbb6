"""ONNX files as models: an ``nn.Module`` that ``torch.export`` captures."""

from t3c_compile.onnx_import.module import OnnxModule, load_onnx
from t3c_compile.onnx_import.node import UnsupportedOnnxError

__all__ = ["OnnxModule", "UnsupportedOnnxError", "load_onnx"]
