"""Relax ops to PrimFuncs: our kernels where there is one, TVM's own legalization for the rest, then operator fusion.

A reshape in any spelling stays ``relax.reshape``, which the VM runs without copying.
"""

import tvm
from tvm import relax

from t3c_compile.backends.tvm.kernels.isa import Isa

_RESHAPES = ("relax.expand_dims", "relax.squeeze", "relax.flatten")


def legalize(module: tvm.IRModule, isa: Isa) -> tvm.IRModule:
    """``module`` with every op but reshape a ``call_tir``, and element-wise neighbours fused."""
    passes = [
        relax.transform.DecomposeOpsForInference(),
        relax.transform.LegalizeOps({op: _as_reshape for op in _RESHAPES}, skip_ops=["relax.reshape"]),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FoldConstant(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(),
    ]
    return tvm.ir.transform.Sequential(passes)(module)


def runtime_pipeline() -> tvm.ir.transform.Pass:
    """From call_tir to VM code: TVM's default build without its legalization, which would turn reshapes into copies."""
    return tvm.ir.transform.Sequential(
        [
            relax.transform.ToNonDataflow(),
            relax.transform.RemovePurityChecking(),
            relax.transform.CallTIRRewrite(),
            relax.transform.StaticPlanBlockMemory(),
            relax.transform.LowerAllocTensor(),
            relax.transform.KillAfterLastUse(),
            relax.transform.LowerRuntimeBuiltin(),
            relax.transform.ComputePrimValue(),
            relax.transform.VMShapeLower(),
            relax.transform.AttachGlobalSymbol(),
        ]
    )


def _as_reshape(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    return relax.op.reshape(call.args[0], call.ty.shape)
