from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

parallel: str
sizes: dict[str, int]
compiler: str

class Program:
    def __init__(
        self,
        rows: list[tuple[str, int, int, int, list[int], tuple[int, list[int]] | None]],
        factor: float,
        base: float,
        slope: float,
        arrays: int,
        works: int,
        scratch: int,
        sums: int,
        /,
    ) -> None: ...

class Plan:
    def __init__(
        self,
        *,
        tree: Any,
        arrays: list[list[Any]],
        mirrors: list[list[np.ndarray]],
        keys: list[list[tuple[int, int]]],
        groups: list[int],
        batches: list[int],
        programs: list[Program],
        folds: list[tuple[Callable[[int, float], tuple[float, ...]], ...]],
        rates: np.ndarray,
        counters: np.ndarray,
        beside: list[np.ndarray],
        before: Callable[[Sequence[int]], None] | None,
        between: Callable[[int, int, Sequence[int]], None],
        results: np.ndarray,
        decide: Callable[[], bool] | None,
        zero_grads: bool,
        threads: int,
        scratch: Any,
    ) -> None: ...
    def take(self) -> None: ...
    def give(self) -> None: ...
    def reprogram(
        self,
        programs: list[Program],
        folds: list[tuple[Callable[[int, float], tuple[float, ...]], ...]],
        /,
    ) -> bool: ...
    def step(self, gradients: Any, hessian: Any, flat: bool, /) -> int | None: ...
    def step_alone(self, gradients: Any, hessian: Any, /) -> int | None: ...

def update(
    program: Program,
    folds: tuple[Callable[[int, float], tuple[float, ...]], ...],
    t: int,
    lr: float,
    gradient: Any,
    hessian: Any,
    arrays: tuple[Any, ...],
    /,
) -> bool: ...
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
def codecs() -> list[tuple[str, int, int, int]]: ...
def operations() -> list[tuple[str, int, int]]: ...
def levels() -> list[str]: ...
def get_level() -> str: ...
def set_level(name: str, /) -> bool: ...
def set_threads(n: int, /) -> None: ...
def get_threads() -> int: ...
def parallel_limit() -> int: ...
def sort_rows(
    indices: np.ndarray, skipped: int | None, /
) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...
def add_rows(
    values: np.ndarray, starts: np.ndarray, order: np.ndarray, sums: np.ndarray, /
) -> bool: ...
