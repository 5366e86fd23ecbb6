"""CUDA code for profiles: kernels for tensor cores and threads, compiled to machine code without a GPU."""
