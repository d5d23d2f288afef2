"""Functions of the core's own types (csrc/table.h), compiled by Numba and kept on disk."""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import CellType, CodeType, FunctionType
from typing import Any

import numba
import numpy as np
from numba import types
from numba.core.errors import NumbaError

from ..programs.element_source import codes, used_globals

POINTER = types.voidptr
TILE_FUNCTION = types.void(types.CPointer(POINTER), POINTER, types.intp)
DECODE = types.void(POINTER, POINTER, POINTER, types.intp)
ENCODE = types.void(POINTER, POINTER, POINTER, types.intp, types.uint64)

# NumPy's error model: with Python's, which raises, no loop with a division is vectorised. No
# fastmath: it contracts, and takes approximate quotients.
jit = numba.njit(error_model="numpy", nogil=True)


def returned(function: FunctionType, dtype: np.dtype, arguments: int) -> list[str]:
    """Return the types of the results of a function of `arguments` numbers of one dtype."""
    kinds = (numba.from_dtype(dtype),) * arguments
    compiled = device(function)
    compiled.compile(kinds)
    result = compiled.overloads[kinds].signature.return_type
    return [str(kind) for kind in (result if isinstance(result, types.BaseTuple) else [result])]


@functools.cache
def device(function: FunctionType) -> Any:
    """A plain Python function, compiled, and with it the plain functions that it calls."""
    return jit(with_compiled_callees(function, device))


def with_compiled_callees(function: FunctionType, compiled: Callable[..., Any]) -> FunctionType:
    """The function, with `compiled` of each plain function in its globals and closure."""

    def replaced(value: Any) -> Any:
        return compiled(value) if isinstance(value, FunctionType) else value

    used = {name: replaced(value) for name, value in used_globals(function)}
    cells = tuple(CellType(replaced(cell.cell_contents)) for cell in function.__closure__ or ())
    copy = FunctionType(
        function.__code__, {**function.__globals__, **used}, function.__name__, None, cells
    )
    copy.__module__ = function.__module__
    return copy


def _described(value: Any) -> Iterator[str]:
    """Return everything that decides what a value of a function's surroundings compiles to."""
    value = getattr(value, "py_func", value)
    if isinstance(value, np.ndarray):
        yield f"{value.dtype} {value.shape} {value.tobytes().hex()}"
        return
    if not isinstance(value, FunctionType):
        yield repr(value)
        return
    for code in codes(value.__code__):
        yield f"{code.co_name} {code.co_code.hex()} {code.co_names} {code.co_varnames}"
        yield from (repr(c) for c in code.co_consts if not isinstance(c, CodeType))
    for name, used in used_globals(value):
        yield f"{name} ="
        yield from _described(used)
    for cell in value.__closure__ or ():
        yield from _described(cell.cell_contents)


def entry(signature: Any, source: str, namespace: Mapping[str, Any]) -> Any:
    """The function `entry` that `source` defines, compiled as a C function of this signature.

    namespace: constants, and plain functions, which are compiled too. The machine code is kept in
    a cache directory, where one can be written to.
    """
    path = _written(source, [d for v in (source, *namespace, *namespace.values())
                             for d in _described(v)])  # fmt: skip
    globals_ = {
        "__name__": __name__,  # by which Numba finds a module again for what it kept
        "carray": numba.carray,
        **{k: device(v) if isinstance(v, FunctionType) else v for k, v in namespace.items()},
    }
    exec(compile(source, str(path or "<fusedopt>"), "exec"), globals_)
    function = globals_["entry"]
    decorate = functools.partial(numba.cfunc, signature, error_model="numpy")
    return _kept(decorate, function) if path is not None else decorate()(function)


def kept(signatures: Any, function: Any) -> Any:
    """A function of a module, compiled for calls from Python, and kept likewise."""
    decorate = functools.partial(numba.njit, signatures, error_model="numpy", nogil=True)
    path = _written(f"# stands for {function.__name__}\n", _described(function))
    if path is None:
        return decorate()(function)
    # Numba looks at the file that a function is from, but not at those of what it uses.
    code = function.__code__.replace(co_filename=str(path))
    return _kept(decorate, FunctionType(code, function.__globals__, function.__name__))


def _kept(decorate: Any, function: Any) -> Any:
    try:
        return decorate(cache=True)(function)
    except NumbaError:
        raise
    except Exception:  # a full disk, no place to write to, a damaged file: do without
        return decorate()(function)


def _written(source: str, described: Iterable[str]) -> Path | None:
    """A file of this source, under a name that depends on the description too, beside which Numba
    keeps its machine code; None where nothing can be written."""
    digest = hashlib.sha256("\n".join((sys.version, *described)).encode()).hexdigest()[:24]
    try:
        path = cache_directory() / f"{digest}.py"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}")
            part.write_text(source)
            part.replace(path)
    except (OSError, RuntimeError):  # RuntimeError: there is no home directory
        return None
    return path


def cache_directory() -> Path:
    """Return the directory of compiled kernels: NUMBA_CACHE_DIR, or the user's cache directory."""
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    if chosen:
        return Path(chosen) / "fusedopt"
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fusedopt"
