"""Kernels compiled at run time, by Numba: what the core has, in Python, and users' own rules.

`codecs` and the rules' element functions are plain Python, free of Numba. `compiler` and what
builds on it import Numba, and are imported where they are needed.
"""
