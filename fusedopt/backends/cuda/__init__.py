"""Steps on a CUDA device: arrays, kernels and plans, behind `backends.numba_cuda`.

`toolkit`, `vectors` and `memory` alone know numba-cuda; nothing is imported before it is needed.
"""
