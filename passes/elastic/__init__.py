"""Elastic layers: the modules that the decompose passes put in place of linear and convolution nodes."""

from t3c_compile.passes.elastic.conv import CpConv2d, DenseConv2d, SvdConv2d, Tucker2Conv2d
from t3c_compile.passes.elastic.layer import ElasticLayer, elastic_layers, full_width_known
from t3c_compile.passes.elastic.linear import DenseLinear, SvdLinear
from t3c_compile.passes.elastic.quantizer import ActivationQuantizer, Gate, Gates
from t3c_compile.passes.elastic.table import Table

__all__ = [
    "ActivationQuantizer",
    "CpConv2d",
    "DenseConv2d",
    "DenseLinear",
    "ElasticLayer",
    "Gate",
    "Gates",
    "SvdConv2d",
    "SvdLinear",
    "Table",
    "Tucker2Conv2d",
    "elastic_layers",
    "full_width_known",
]
