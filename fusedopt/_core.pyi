from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

parallel: str
sizes: dict[str, int]
compiler: str

Fold: TypeAlias = Callable[[int, float], tuple[float, ...]]
Numbers: TypeAlias = tuple[tuple[Fold, ...], tuple[float, float, float]]

class Program:
    def __init__(
        self,
        rows: list[
            tuple[str, int, int, int, int, list[int], tuple[int, int, int, list[int]] | None]
        ],
        arrays: int,
        works: int,
        scratch: int,
        sums: int,
        over: int,
        /,
    ) -> None: ...

class Plan:
    def __init__(self, description: Any, /) -> None: ...
    def take(self, token: object, /) -> None: ...
    def give(self, token: object, /) -> None: ...
    def held(self, token: object, /) -> bool: ...
    def reprogram(self, programs: list[Program], numbers: list[Numbers], /) -> bool: ...
    def renumber(self, given: list[dict[str, Any]], /) -> bool: ...
    def step(self, gradients: Any, hessian: Any, flat: bool, /) -> int | None: ...
    def settle(self, policy: Any, /) -> None: ...
    def whole_step(
        self,
        gradients: Any,
        hessian: Any,
        grad_scale: float,
        ask: Callable[[int], None] | None,
        /,
    ) -> Any: ...

class Outcome:
    def finish(self, result: Any, error: BaseException | None, /) -> None: ...

class Context:
    def __init__(
        self,
        enter: Callable[[], Any],
        leave: Callable[[], Any],
        idle: list[Any],
        ready: Callable[[], bool],
        directly: Callable[[Callable[[], Any]], Any],
        /,
    ) -> None: ...
    def __enter__(self) -> Any: ...
    def __exit__(self, *exception: object) -> None: ...

def hand_over(idle: list[Any], function: Callable[[], Any], /) -> Any: ...
def update(
    program: Program,
    numbers: Numbers,
    t: int,
    lr: float,
    gradient: Any,
    hessian: Any,
    arrays: tuple[Any, ...],
    /,
) -> bool: ...
def step_at(
    program: Program,
    numbers: Numbers,
    t: int,
    lr: float,
    wide: bool,
    elements: list[int],
    addresses: list[int],
    /,
) -> None: ...
def sums_of_squares(arrays: list[np.ndarray], /) -> Any: ...
def orthogonalize(
    stack: np.ndarray,
    workspace: np.ndarray,
    coefficients: list[float],
    prescale: float,
    eps: float,
    factor: float,
    by_row: bool,
    threads: int,
    /,
) -> None: ...
def orthogonalize_space(rows: int, columns: int, /) -> int: ...
def orthogonalize_bfloat16(
    stack: np.ndarray,
    space: np.ndarray,
    coefficients: list[float],
    prescale: float,
    eps: float,
    factor: float,
    by_row: bool,
    threads: int,
    unit: str | None,
    /,
) -> None: ...
def orthogonalize_bfloat16_space(count: int, rows: int, columns: int, threads: int, /) -> int: ...
def matrix_units() -> list[str]: ...
def thread_processors(threads: int, /) -> list[list[int]]: ...
def first_touch(leaves: list[tuple[int, list[np.ndarray]]], threads: int, /) -> None: ...

class ThreadChoice:
    def all(self) -> bool: ...
    def tell(self, all: bool, seconds: float, /) -> None: ...

THREAD_TRIALS: int

def codecs() -> list[tuple[str, int, int, int]]: ...
def operations() -> list[tuple[str, int, int]]: ...
def levels() -> list[str]: ...
def get_level() -> str: ...
def set_level(name: str, /) -> bool: ...
def set_threads(n: int, /) -> None: ...
def get_threads() -> int: ...
def parallel_limit() -> int: ...
def bound_processors() -> list[int]: ...
def floating_point(control: int | None = None) -> int: ...
def sort_rows(
    indices: np.ndarray, skipped: int | None, /
) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...
def add_rows(
    values: np.ndarray, starts: np.ndarray, order: np.ndarray, sums: np.ndarray, /
) -> bool: ...

class Mean:
    def __init__(self, arrays: list[np.ndarray], divisor: float, /) -> None: ...
    def write(self, out: np.ndarray, /) -> bool: ...
