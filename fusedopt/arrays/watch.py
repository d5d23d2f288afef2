"""Watch what becomes of the caller's arrays after they were handed over."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from .foreign import address_of
from .trees import Leaf


class Watch:
    """Watch over the caller's arrays, for other memory, another dtype or another shape.

    A tensor's old memory is kept alive by the array that was made of it, so that a step would
    update what nobody sees any more. An ndarray's (`ndarray.resize`) is freed, also under views and
    under an ndarray that was made of a subclass: `arrays` are those that such a step would write
    to, and those whose memory they use.
    """

    def __init__(self, leaves: Iterable[Leaf]) -> None:
        self._tensors: list[tuple[str, Any, Any]] = []
        known: dict[int, tuple[str, np.ndarray, _Layout]] = {}
        for leaf in leaves:
            address = address_of(leaf.value)
            if address:
                self._tensors.append((leaf.label, address, address()))
            array = leaf.value
            while isinstance(array, np.ndarray):
                known.setdefault(id(array), (leaf.label, array, _layout(array)))
                array = array.base
        self._known = list(known.values())
        self.arrays = [array for _, array, _ in self._known]
        self.has_tensors = bool(self._tensors)

    def check_tensors(self) -> None:
        """Raise ValueError if a tensor has moved."""
        for label, address, known in self._tensors:
            if address() != known:
                raise ValueError(_moved(label))

    def moved(self) -> bool:
        """Whether anything is not what it was."""
        return any(address() != known for _, address, known in self._tensors) or any(
            _layout(array) != known for _, array, known in self._known
        )

    def check(self) -> None:
        """Raise ValueError if anything is not what it was."""
        self.check_tensors()
        for label, array, known in self._known:
            found = _layout(array)
            if found == known:
                continue
            if found[1:] == known[1:]:
                raise ValueError(_moved(label))
            before, after = (f"{dtype} of shape {shape}" for _, dtype, shape, _ in (known, found))
            raise ValueError(
                f"{label}: is {after} and strides {found[3]} now, and was {before} and strides"
                f" {known[3]}; undo that, or make a new optimizer"
            )


_Layout = tuple[int, np.dtype, tuple[int, ...], tuple[int, ...]]


def _layout(array: np.ndarray) -> _Layout:
    return array.__array_interface__["data"][0], array.dtype, array.shape, array.strides


def _moved(label: str) -> str:
    return f"{label}: is in other memory than before; call rebind(params) after such a change"
