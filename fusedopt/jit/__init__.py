"""Kernels compiled at run time, by Numba: what the core has, in Python, and users' own rules.

`scalar_codecs`, `block_codecs` and the rules' element functions are plain Python, free of Numba.
`compiler` and what builds on it import Numba, and are imported where they are needed.
"""

from __future__ import annotations


def unavailable() -> str | None:
    """Return why Numba cannot be used here, or None where it can."""
    try:
        from . import tiles  # noqa: F401  # 0.5 s, for those who ask
    except ImportError as error:
        return f"Numba could not be imported ({error}); pip install 'fusedopt[numba]' adds it"
    return None
