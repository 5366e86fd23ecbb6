"""The compiler pipelines: Relax to VM code, and scheduled TIR to LLVM."""

import tvm
from tvm import relax, s_tir, tirx
from tvm.s_tir.pipeline import finalize_device_passes, finalize_host_passes
from tvm.tirx.compilation_pipeline import register_tir_pipeline

KERNEL_PIPELINE = "t3c"


def runtime_pipeline(cuda_graphs: bool = False) -> tvm.ir.transform.Pass:
    """From call_tir to VM code: TVM's default build without its legalization, which would turn reshapes into copies.

    ``cuda_graphs``: launches between tensors of known sizes are captured at the first call, and repeated as one.
    """
    graphs = [tvm.ir.transform.module_pass(_with_graphs, opt_level=0, name="t3c-cuda-graphs")] if cuda_graphs else []
    return tvm.ir.transform.Sequential(
        [
            relax.transform.ToNonDataflow(),
            relax.transform.RemovePurityChecking(),
            relax.transform.CallTIRRewrite(),
            relax.transform.StaticPlanBlockMemory(),
            *graphs,
            relax.transform.LowerAllocTensor(),
            relax.transform.KillAfterLastUse(),
            relax.transform.LowerRuntimeBuiltin(),
            relax.transform.ComputePrimValue(),
            relax.transform.VMShapeLower(),
            relax.transform.AttachGlobalSymbol(),
        ]
    )


def _with_graphs(module: tvm.IRModule, _: tvm.ir.transform.PassContext) -> tvm.IRModule:
    # The pass looks for its permission in the context.
    with tvm.ir.transform.PassContext(config={"relax.backend.use_cuda_graph": True}):
        return relax.transform.RewriteCUDAGraph()(module)


def _kernel_passes() -> tuple[tvm.ir.transform.Pass, object, object]:
    # TVM's CPU pipeline without buffer compaction and common subexpressions: on kernels with symbolic sizes the two
    # took 95% of the time to compile, and LLVM does what they would. So it does without RenormalizeSplitPattern and
    # RemoveNoOp, which took a tenth of what was left.
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
        tirx.transform.StmtSimplify(),
        s_tir.transform.RewriteUnsafeSelect(),
        tirx.transform.VerifyMemory(),
        tirx.transform.AnnotateEntryFunc(),
        tirx.transform.SplitHostDevice(),
        tirx.transform.MakePackedAPI(),
    ]
    return tvm.ir.transform.Sequential(passes), finalize_host_passes, finalize_device_passes


register_tir_pipeline(KERNEL_PIPELINE, _kernel_passes)
