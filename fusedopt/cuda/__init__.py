"""Steps on a CUDA device: arrays, kernels and plans, behind `backends.numba_cuda`.

`toolkit` is the only module that knows numba-cuda; nothing is imported before it is needed.
"""
