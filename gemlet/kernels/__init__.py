"""Kernels in C++, compiled on first use by the compiler that is there. None of them is needed, only faster."""
