"""CUDA C++ to machine code by NVRTC, a library that needs neither a GPU nor a host compiler.

TVM's own callback compiles with ``--use_fast_math``, which rounds divisions and square roots otherwise and joins
products and sums; here every operation of the source is rounded as IEEE 754 has it, and ``fmaf`` alone is fused.
"""

from t3c_compile.passes.errors import T3CError

# Warp-wide instructions, and what TVM has no name for. Of two lanes that exchange, both are in one half of a warp.
PRELUDE = r"""
typedef signed char int8_t; typedef unsigned char uint8_t; typedef short int16_t; typedef unsigned short uint16_t;
typedef int int32_t; typedef unsigned int uint32_t; typedef long long int64_t; typedef unsigned long long uint64_t;
#define CUDART_INF_F __int_as_float(0x7f800000)
#define CUDART_NAN_F __int_as_float(0x7fffffff)
__device__ __forceinline__ float t3c_exchange(float value, int distance) {
  return __shfl_xor_sync(0xffffffffu, value, distance);
}
__device__ __forceinline__ int t3c_nearest(float value) { return __float2int_rn(value); }
// Words that lie aligned, at once.
__device__ __forceinline__ void t3c_copy1(int* to, const int* from) { *to = *from; }
__device__ __forceinline__ void t3c_copy2(int* to, const int* from) { *(int2*)to = *(const int2*)from; }
__device__ __forceinline__ void t3c_copy4(int* to, const int* from) { *(int4*)to = *(const int4*)from; }
// c[16 x 8] += a[16 x 32] b[32 x 8] of int8, four of them in a word, over the lanes of a warp as PTX lays them out:
// https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-fragment-mma-16832
__device__ __forceinline__ void t3c_mma(int* c, int a0, int a1, int a2, int a3, int b0, int b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
"""


class CudaCompilerError(T3CError):
    """CUDA code cannot be compiled: NVRTC is not installed, or it refuses the code or the architecture."""


def require_compiler(arch: str) -> None:
    """Raise :class:`CudaCompilerError` where code for ``arch`` cannot be compiled here."""
    compile_cuda('extern "C" __global__ void nothing() {}', arch)


def kernels_of(source: str) -> str:
    """What of TVM's CUDA source are kernels: it begins with includes of headers, which they do not need."""
    start = source.find('extern "C" __global__')
    return "#define uint unsigned int\n#define uchar unsigned char\n#define ushort unsigned short\n" + source[start:]


def compile_cuda(source: str, arch: str, ptx: bool = False) -> bytes:
    """TVM's CUDA ``source`` as a cubin for ``arch`` (``sm_80``), or as PTX for it.

    A cubin is machine code: loading one compiles nothing, and one for another generation is refused rather than
    translated. Raises :class:`CudaCompilerError`.
    """
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise CudaCompilerError(
            f"compiling for {arch} needs NVRTC, and {error}: pip install 't3c-compile[cuda]' (no GPU is needed)"
        ) from error
    code = (PRELUDE + kernels_of(source)).encode()
    options = [f"--gpu-architecture={arch.replace('sm_', 'compute_') if ptx else arch}".encode()]
    options += [b"--fmad=false", b"--prec-div=true", b"--prec-sqrt=true", b"--ftz=false", b"-default-device", b"-w"]
    ok = nvrtc.nvrtcResult.NVRTC_SUCCESS
    try:
        status, program = nvrtc.nvrtcCreateProgram(code, b"t3c.cu", 0, None, None)
    except RuntimeError as error:  # the library itself is not there
        raise CudaCompilerError(
            f"compiling for {arch} needs NVRTC: pip install 't3c-compile[cuda]' ({error})"
        ) from error
    if status != ok:
        raise CudaCompilerError(f"NVRTC takes no program: {status}")
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if status != ok:
            log = bytearray(nvrtc.nvrtcGetProgramLogSize(program)[1])
            nvrtc.nvrtcGetProgramLog(program, log)
            raise CudaCompilerError(f"NVRTC refuses the code for {arch} ({status}):\n{log.decode(errors='replace')}")
        if ptx:
            size, get = nvrtc.nvrtcGetPTXSize(program)[1], nvrtc.nvrtcGetPTX
        else:
            size, get = nvrtc.nvrtcGetCUBINSize(program)[1], nvrtc.nvrtcGetCUBIN
        binary = bytearray(size)
        get(program, binary)
        return bytes(binary)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
