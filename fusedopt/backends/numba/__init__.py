"""Steps on NumPy arrays by kernels that Numba compiles."""
