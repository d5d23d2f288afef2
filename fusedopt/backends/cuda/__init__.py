"""Steps on a CUDA device: arrays, kernels and plans, behind the backend "cuda".

`toolkit`, `vectors` and `buffers` alone know numba-cuda; nothing is imported before it is needed.
"""
