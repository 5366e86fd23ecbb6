"""The compiler pipelines: Relax to VM code, and scheduled TIR to LLVM."""

import tvm
from tvm import relax, s_tir, tirx
from tvm.s_tir.pipeline import finalize_device_passes, finalize_host_passes
from tvm.tirx.compilation_pipeline import register_tir_pipeline

KERNEL_PIPELINE = "t3c"


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


def _kernel_passes() -> tuple[tvm.ir.transform.Pass, object, object]:
    # TVM's CPU pipeline without buffer compaction and common subexpressions: on kernels with symbolic sizes the two
    # took 95% of the time to compile, and LLVM does what they would.
    passes = [
        s_tir.transform.CanonicalizeLoop(),
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.LowerOpaqueBlock(),
        tirx.transform.FlattenBuffer(),
        tirx.transform.NarrowDataType(32),
        s_tir.transform.LoopPartition(),
        tirx.transform.VectorizeLoop(True),
        tirx.transform.StorageRewrite(),
        tirx.transform.UnrollLoop(),
        s_tir.transform.RenormalizeSplitPattern(),
        tirx.transform.StmtSimplify(),
        tirx.transform.RemoveNoOp(),
        s_tir.transform.RewriteUnsafeSelect(),
        tirx.transform.VerifyMemory(),
        tirx.transform.AnnotateEntryFunc(),
        tirx.transform.SplitHostDevice(),
        tirx.transform.MakePackedAPI(),
    ]
    return tvm.ir.transform.Sequential(passes), finalize_host_passes, finalize_device_passes


register_tir_pipeline(KERNEL_PIPELINE, _kernel_passes)
