"""Bench of the compiled Triton kernels: registers, shared memory, time to compile."""
