"""The rule and the states that an optimizer holds: shown, saved, loaded and copied."""

from __future__ import annotations

import copy
import operator
import os
from collections.abc import Mapping, Sequence
from typing import Any, Self

from ..arrays.formats import RandomKey
from ..arrays.order import memory_order
from ..arrays.stored import LeafState
from ..plan.options import Options
from ..rules.base import Rule
from ..rules.groups import RuleChoice
from .assembly import Assembly
from .checkpoint import Snapshot
from .summary import describe, digest


class Persistent:
    """The part of an optimizer that shows, saves, loads and copies its rule and its states."""

    params: Any
    _rule: RuleChoice
    _assembly: Assembly

    @property
    def rule(self) -> RuleChoice:
        """The rule, mapping or callable that was given, with what was changed since.

        A callable stays as it is; `groups` has its rules.
        """
        given = self._rule
        rules = [group.rule for group in self._assembly.groups]
        if isinstance(given, Rule):
            return rules[0]
        if isinstance(given, Mapping) and any(map(operator.is_not, given.values(), rules)):
            return dict(zip(given, rules, strict=True))
        return given

    @property
    def step_count(self) -> int:
        """The number of steps that have been taken."""
        return int(self._assembly.counters[0])

    @property
    def state(self) -> dict[str, dict[str, Any]]:
        """The live states: path -> name -> array, or `Quantized` object.

        Beside the rule's states there are "master" of master="float32"; "low" of "split16", the
        uint16 below a bfloat16; "compensation" of rounding="kahan".
        """
        self._assembly.check_owner()
        held = zip(self._assembly.paths, self._assembly.leaf_states, strict=True)
        return {path: leaf_state.visible for path, leaf_state in held}

    def leaf_state(self, path: str) -> tuple[LeafState, list[RandomKey]]:
        """Return all that a step writes of a leaf.

        Parameters
        ----------
        path : str
            Path of the leaf.

        Returns
        -------
        LeafState
            The live states.
        list
            Keys of the random bits of stochastic rounding.
        """
        k = self._assembly.paths.index(path)
        return self._assembly.leaf_states[k], self._assembly.keys()[k]

    def flush(self) -> None:
        """Write the states in `state_path` to the disk now, wait, and free the memory they take.

        Raises
        ------
        OSError
            If the disk failed.
        """
        self._assembly.check_owner()
        if self._assembly.state_file:
            self._assembly.state_file.flush()

    def describe(self) -> str:
        """Describe what updates which leaf, and the memory that it takes.

        Returns
        -------
        str
            A table for people to read.
        """
        return describe(self._assembly)

    def fingerprint(self) -> str:
        """Return a digest of parameters, states and counters.

        Returns
        -------
        str
            Hexadecimal digits, equal where all bits are equal, on every machine. Any NaN counts as
            any other.
        """
        assembly = self._assembly
        assembly.check_owner()
        if not assembly.options.wait and not assembly.exchanged:
            assembly.whole("synchronize", lambda: None)
        states = (leaf_state.saved for leaf_state in assembly.leaf_states)
        return digest(assembly.paths, assembly.parameters, states, assembly.counters)

    def snapshot(self) -> Snapshot:
        """Return the live state that checkpoints and `fusedopt.interop` hold.

        Returns
        -------
        Snapshot
            Parameters, states and counters of the optimizer, not copied.
        """
        return self._assembly.snapshot

    def state_dict(self) -> dict[str, Any]:
        """Return counters and copies of the states; the parameters are the caller's to keep.

        Returns
        -------
        dict
            {"format": 1, "step": ..., "seed": ..., "leaves": {path: {"rule", "hyperparameters",
            "t", "shape", "dtype", "order", "formats", "state"}}}. A quantised state m has "m.codes"
            and "m.scales". Hyperparameters serve for comparison and are not taken over.
        """

        def take() -> dict[str, Any]:
            self._assembly.check_settled("state_dict")
            return self._assembly.snapshot.take()

        return self._assembly.whole("state_dict", take)

    def load_state_dict(self, state: dict[str, Any], *, strict: bool = True) -> None:
        """Go on from a `state_dict`, copying its arrays; with equal parameters, bit for bit.

        Put the parameters back first: masters come from the `state_dict`, not from them.
        Accumulated gradients are forgotten.

        Parameters
        ----------
        state : dict
            Result of `state_dict`.
        strict : bool
            Whether hyperparameters must be equal too, of schedules their printed form. With False
            only those must be equal that determine what the states hold, such as `amsgrad`.

        Raises
        ------
        TypeError, ValueError
            If anything differs; the message lists every difference. Nothing has changed then.
        """

        def restore() -> None:
            self._assembly.go_on(self._assembly.snapshot.restore(state, strict=strict))

        self._assembly.loaded("load_state_dict", restore)

    def save(
        self, path: str | os.PathLike[str], *, parameters: bool = True, metadata: Any = None
    ) -> None:
        """Write states, counters and parameters to one safetensors file: all that a run needs.

        A file at `path` is replaced at once when the new one is whole and on the disk: a process
        killed at any moment leaves the old file or the new one. The parameter of the leaf `b.0` is
        called `p:b.0` there, its state m `m:b.0`; arrays have their axes as in memory.

        Parameters
        ----------
        path : path
            The file to write.
        parameters : bool
            Whether to write the parameters and the arrays of `copy_out` too.
        metadata : object, optional
            Anything else that belongs to this moment of the run, in the types of JSON, which `load`
            returns.

        Raises
        ------
        OSError
            If the file cannot be written, or `path` is no regular file.
        TypeError, ValueError
            If the metadata is not of the types of JSON.
        """

        def save() -> None:
            self._assembly.check_settled("save")
            self._assembly.snapshot.save(path, parameters, metadata)

        self._assembly.whole("save", save)

    def load(
        self, path: str | os.PathLike[str], *, parameters: bool = True, strict: bool = True
    ) -> Any:
        """Go on from a file of `save`, bit for bit: parameters and states are written in place.

        Accumulated gradients are forgotten.

        Parameters
        ----------
        path : path
            The file to read.
        parameters : bool
            Whether to read the parameters. With False the caller's must be in place.
        strict : bool
            Whether hyperparameters must be equal, as in `load_state_dict`.

        Returns
        -------
        object
            The metadata that `save` was given, tuples as lists.

        Raises
        ------
        ValueError
            If the file is not whole, of another version or of another optimizer; the message lists
            every difference. Nothing has changed then.
        OSError
            If the file cannot be read. Where the disk fails, or the file is shortened, while the
            arrays are read, the optimizer has part of them and refuses everything until it has
            loaded a whole file.
        """

        def load() -> Any:
            snapshot = self._assembly.snapshot
            seed, metadata = snapshot.load(path, strict=strict, parameters=parameters)
            self._assembly.go_on(seed)
            return metadata

        return self._assembly.loaded("load", load)

    def __reduce__(self) -> tuple[Any, ...]:
        for leaf, p in zip(self._assembly.tree.leaves, self._assembly.parameters, strict=True):
            if memory_order(p) not in ("C", "F"):  # NumPy's pickle would put it in C order
                raise TypeError(
                    f"{leaf.label}: a pickle does not keep the memory order of its axes, which is"
                    f" {memory_order(p)}; use save() and load(), or copy.deepcopy"
                )
        return self._recipe()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        rebuild, arguments = self._recipe()
        made: Self = rebuild(*copy.deepcopy(arguments, memo))
        return made

    def _recipe(self) -> tuple[Any, ...]:
        # Pickled or deep-copied together with a tree that holds the same arrays, both copies go
        # on sharing them; on its own, an optimizer takes its arrays along.
        assembly = self._assembly
        if assembly.exchanged:
            raise RuntimeError(f"an optimizer inside of {assembly.exchanged}() cannot be copied")
        if assembly.state_file:
            raise TypeError(
                f"an optimizer with state_path {assembly.state_file.directory} cannot be copied or"
                " pickled, since both would use that directory; take its state_dict()"
            )
        rules = [group.rule for group in assembly.groups]  # those of a callable may be replaced
        given = type(self), self.params, self.rule, assembly.options
        return _rebuild, (*given, rules, self.state_dict())

    def __copy__(self) -> Self:
        raise TypeError(
            "two optimizers would update the same arrays; copy.deepcopy makes one with its own"
        )


def _rebuild(
    kind: Any,
    params: Any,
    rule: Any,
    options: Options,
    rules: Sequence[Rule],
    state: dict[str, Any],
) -> Any:
    optimizer = kind(params, rule, **options._asdict())
    optimizer._assembly.take_rules(rules)
    optimizer.load_state_dict(state)
    return optimizer
