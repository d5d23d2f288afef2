"""Nested parameters: their leaves, the leaves' names, and trees that must fit them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

ROOT = "params"


class Leaf(NamedTuple):
    """A leaf's dotted path (`block.0.w`), how messages call it, and what stands there."""

    path: str
    label: str
    value: Any


def leaves_of(tree: Any, root: str) -> Iterator[Leaf]:
    """The leaves of any nesting, in order, under a name of their own; None is no leaf."""
    return _walk(tree, "", root)


def values_of(tree: Any) -> Iterator[Any]:
    """Return the values at the leaves of any nesting, in order; None is no leaf."""
    children = _children(tree)
    if children is None:
        yield tree
    else:
        for _, child in children:
            yield from values_of(child)


class Fixed:
    """Gradients on a CUDA device that the caller promises to leave where they are.

    Parameters
    ----------
    tree : nested arrays
        Gradients, as `Optimizer.step` takes them.

    Notes
    -----
    As long as this object is used, its leaves, and the parameters of the optimizers that it is
    given to, must be the same arrays in the same memory: none may be replaced in the tree, and no
    tensor may be given other memory (`t.data = ...`, `zero_grad(set_to_none=True)`). Their
    elements may change. From the third step in a row on they are not looked at, so that the time
    of a step on the host does not depend on their number. The object keeps its tree alive. Arrays
    that are exchanged by DLPack alone are looked at in every step, since only that says when they
    may be read.
    """

    def __init__(self, tree: Any) -> None:
        self.tree = tree


def opened(tree: Any) -> Any:
    """The tree itself, where it is `Fixed`."""
    return tree.tree if isinstance(tree, Fixed) else tree


class Tree:
    """The shape of a nesting of dicts, lists and tuples, taken from the parameters.

    None in the place of a parameter, such as the bias of a layer without one, is no leaf.

    spec: the shape as the compiled core reads it: an int for a leaf, (keys, children) for a dict,
    a list for a list or tuple, None for None. Raises ValueError where two leaves get the same path,
    or where there is no leaf.
    """

    def __init__(self, params: Any) -> None:
        self.leaves = list(leaves_of(params, ROOT))
        if not self.leaves:
            raise ValueError(f"{ROOT}: found no arrays; give an ndarray or a nesting of them")
        # Containers of its own: the caller may change those that were given.
        self._like = _rebuild(params, iter(range(len(self.leaves))))
        self.spec = _spec(self._like)
        seen: dict[str, str] = {}
        for leaf in self.leaves:
            if leaf.path in seen:
                raise ValueError(
                    f"{leaf.label}: has the path {leaf.path!r} of {seen[leaf.path]}; rename one of"
                    " the keys"
                )
            seen[leaf.path] = leaf.label

    def flatten(self, tree: Any, what: str) -> list[Any]:
        """The leaves of a tree of this shape, in order; `what` names it in messages.

        Raises TypeError or ValueError where its shape differs.
        """
        return list(_zip(self._like, tree, what))

    def build(self, leaves: Sequence[Any]) -> Any:
        """A tree of this shape with other leaves."""
        return _rebuild(self._like, iter(leaves))

    def successor(self, params: Any) -> Tree:
        """The tree of other parameters; TypeError or ValueError where its shape differs."""
        for leaf, value in zip(self.leaves, self.flatten(params, ROOT), strict=True):
            if value is None:
                raise TypeError(f"{leaf.label}: expected an array, got None")
        return Tree(params)


def _rebuild(like: Any, leaves: Iterator[Any]) -> Any:
    children = _children(like)
    if children is None:
        return next(leaves)
    if like is None:
        return None
    built = [_rebuild(child, leaves) for _, child in children]
    return dict(zip(like, built, strict=True)) if isinstance(like, dict) else built


def _children(node: Any) -> list[tuple[Any, Any]] | None:
    """(key, child) pairs of a container, of which None has none; None for a leaf."""
    if node is None:
        return []
    if isinstance(node, dict):
        return list(node.items())
    if isinstance(node, (list, tuple)):
        return list(enumerate(node))
    return None


def _walk(node: Any, path: str, label: str) -> Iterator[Leaf]:
    children = _children(node)
    if children is None:
        yield Leaf(path or ROOT, label, node)
        return
    for key, child in children:
        yield from _walk(child, f"{path}.{key}" if path else str(key), f"{label}[{key!r}]")


def _spec(node: Any) -> Any:
    if isinstance(node, dict):
        return list(node), [_spec(child) for child in node.values()]
    return [_spec(child) for child in node] if isinstance(node, list) else node


def _zip(like: Any, tree: Any, label: str) -> Iterator[Any]:
    children = _children(like)
    if children is None:
        if tree is not None and _children(tree) is not None:
            raise TypeError(f"{label}: expected one array, got a {type(tree).__name__}")
        yield tree
        return
    if like is None:
        if tree is not None:
            raise TypeError(
                f"{label}: expected None, as the parameters have in this place, got"
                f" {_describe(tree)}"
            )
        return
    if isinstance(like, dict):
        if not isinstance(tree, dict):
            raise TypeError(
                f"{label}: expected a dict with the keys {list(like)}, got"
                f" {_describe(tree)}; give None for each array that is to be left alone"
            )
        missing, surplus = [k for k in like if k not in tree], [k for k in tree if k not in like]
        if missing or surplus:
            raise ValueError(
                f"{label}: the keys differ from the parameters': missing {missing}, unknown"
                f" {surplus}; give None for an array that is to be left alone"
            )
    elif not isinstance(tree, (list, tuple)) or len(tree) != len(like):
        raise (ValueError if isinstance(tree, (list, tuple)) else TypeError)(
            f"{label}: expected a list or tuple of length {len(like)}, got {_describe(tree)}"
        )
    for key, child in children:
        yield from _zip(child, tree[key], f"{label}[{key!r}]")


def _describe(tree: Any) -> str:
    if tree is None:
        return "None"
    name = type(tree).__name__
    return f"a {name} of length {len(tree)}" if isinstance(tree, (list, tuple)) else f"a {name}"
