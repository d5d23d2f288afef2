"""The optimizer: many tensors, one rule or several, one step in place."""

from __future__ import annotations

import copy
import operator
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from .arrays.formats import RandomKey
from .arrays.order import memory_order
from .arrays.storage import Master, Rounding, StateDtype
from .arrays.stored import LeafState
from .plan.options import ClipNorm, Options
from .rules import Rule
from .rules.groups import RateChoice, RuleChoice, with_hyperparameters, with_rates
from .rules.hyperparameters import Schedule
from .step import exchange, summary
from .step.accumulate import ACCUMULATED
from .step.assembly import Assembly
from .step.checkpoint import Snapshot
from .step.exchange import Averaged, Exchange
from .step.info import StepInfo
from .step.parameter_group import ParameterGroup
from .step.rates import StepRate


class Optimizer:
    """Update nested parameters in place, all of them in one fused pass.

    Parameters
    ----------
    params : array or nested dicts, lists and tuples of arrays
        Dense writable arrays of float32, float64, bfloat16 (of ml_dtypes) or float16, none
        overlapping another; on a CUDA device, arrays of CuPy, PyTorch or Numba. None, such as the
        bias of a layer without one, is no parameter; gradients have None there too.
    rule : Rule, mapping or callable
        One rule for all leaves; path patterns -> rules, of which the first that matches a leaf's
        dotted path (`block.0.w`) takes it; or a callable of path and array.
    clip_norm : float or mapping, optional
        Multiply gradients by min(1, clip_norm / norm of all unscaled gradients); a mapping clips
        each parameter group on its own. A norm that is NaN or infinite raises.
    clip_value : float, optional
        Keep every element of the unscaled gradients within +- this value instead.
    skip_nonfinite : bool
        Skip a step with a NaN or infinity in any gradient, and say so in its `StepInfo`.
    zero_grads : bool
        Set the gradients to zero in the pass that reads them.
    state_dtype : str or mapping, optional
        Format of the states, for all or by name: "float32", "float64", "bfloat16", "float16", or,
        from 4096 elements on, in blocks, "float8", "dynamic8", "dynamic4".
    rounding : {"nearest", "stochastic", "kahan"}
        Rounding to bfloat16 and float16, of parameters without masters and of states.
    master : {"float32", "split16"}, optional
        Float32 masters of narrow parameters, or 16 more bits beside each bfloat16.
    copy_out : nested arrays, optional
        Arrays like the parameters, or None, into which the same pass writes the new parameters.
    ema : float or schedule, optional
        Keep averages: average := average + (1 - ema) (parameter - average). See `averaged`.
    stats : bool
        Measure what `StepInfo.stats` tells, in the same passes.
    exact : bool
        Replay later the steps that rows missed which `Rows` left out. See `catch_up`.
    state_path : path, optional
        An empty or new directory for states larger than memory; its file is no checkpoint.
    seed : int
        Seed of stochastic rounding, whose bits depend on it and on a leaf's path and step.
    backend : {"auto", "native", "numba", "reference", "cuda"}
        What runs the steps; "auto" takes "cuda" for arrays on a device.
    threads : int, optional
        Largest number of threads.
    verify : bool
        Run every step on copies, compare with the float64 reference, commit only what agrees.
    wait : bool
        With False, steps on a CUDA device do not wait for the norm of `clip_norm`: see Notes.

    Raises
    ------
    TypeError, ValueError
        If a value is of the wrong kind, or does not fit.
    RuntimeError
        If the backend cannot be used, or, of a method, another thread uses the optimizer.
    OSError
        If `state_path` is in use, holds anything else (FileExistsError), or has no room.

    Notes
    -----
    With `wait=False`, `StepInfo.grad_norm` and `clip_scale` are arrays of the device, whose
    `float()` waits. Where a norm is not finite the device takes neither that step nor a later one;
    the next step that knows, or whatever else waits, raises FloatingPointError, and counters are
    those before that step. It does not go with `skip_nonfinite`.
    """

    _first_tiles: Sequence[int] | None = None

    def __init__(
        self,
        params: Any,
        rule: RuleChoice,
        *,
        clip_norm: ClipNorm = None,
        clip_value: float | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
        state_dtype: StateDtype = None,
        rounding: Rounding = "nearest",
        master: Master | None = None,
        copy_out: Any = None,
        ema: float | Schedule | None = None,
        stats: bool = False,
        exact: bool = False,
        state_path: str | os.PathLike[str] | None = None,
        seed: int = 0,
        backend: str = "auto",
        threads: int | None = None,
        verify: bool = False,
        wait: bool = True,
    ) -> None:
        self.params = params
        self._rule = rule
        options = Options(
            clip_norm, clip_value, skip_nonfinite, zero_grads, state_dtype, rounding, master,
            copy_out, ema, stats, exact, seed, backend, threads, verify, wait,
        )  # fmt: skip
        self._assembly = Assembly(params, rule, options, state_path, self._first_tiles)

    def step(
        self,
        grads: Any = ACCUMULATED,
        *,
        grad_scale: float = 1.0,
        hessian: Any = None,
        lr: StepRate | None = None,
    ) -> StepInfo:
        """Take one step, in place.

        Parameters
        ----------
        grads : nested arrays, optional
            Like the parameters, in any dtype that these may have, and not overlapping them. A None
            leaf leaves its parameter, states and step count alone. By default those that
            `accumulate` added up, which are consumed also by a step that is skipped.
        grad_scale : float
            Divides the gradients before they are examined: the scale of the loss, for example.
        hessian : nested arrays, optional
            Hessian estimates for Sophia, nested like the gradients.
        lr : float or mapping, optional
            Learning rate of this step alone, for all parameter groups or for each label.

        Returns
        -------
        StepInfo
            Number of the step, learning rate, norm, and whether the step was skipped.

        Raises
        ------
        TypeError, ValueError
            If an argument does not fit. Nothing has changed then, nor after the errors below.
        FloatingPointError
            If `clip_norm` finds a norm that is NaN or infinite.
        RuntimeError
            Inside of `lookahead` and `averaged`, or while another thread uses the optimizer.
        """
        assembly = self._assembly
        if assembly.exchanged:
            raise RuntimeError(f"step inside of {assembly.exchanged}(): leave the context first")
        if assembly.watch.has_tensors:
            assembly.watch.check_tensors()
        if grads is not ACCUMULATED and lr is None and assembly.whole_step is not None:
            info: StepInfo | None = assembly.whole_step(grads, hessian, grad_scale, assembly.ask)
            if info is not None:
                return info
        return assembly.step(grads, grad_scale, hessian, lr)

    def step_part(
        self,
        paths: Sequence[str],
        grads: Sequence[Any],
        *,
        grad_scale: float = 1.0,
        last: bool = False,
    ) -> StepInfo:
        """Take a step of some leaves alone, such as those whose gradients have just been found.

        All parts have the number, and so the learning rate, of one step, and each leaf has the bits
        that a whole step gives it. A leaf without a part is left alone.

        Parameters
        ----------
        paths : sequence of str
            Paths of the leaves, each at most once in a step.
        grads : sequence of array
            Gradients of these leaves.
        grad_scale : float
            Divides the gradients, as in `step`.
        last : bool
            Whether this part, which may be empty, ends the step.

        Returns
        -------
        StepInfo
            As of a step.

        Raises
        ------
        TypeError, ValueError
            If an argument does not fit, a path is unknown or comes again, or the optimizer has
            `clip_norm`, `skip_nonfinite` or `exact`, which need all gradients. Nothing has changed
            then.
        """
        self._assembly.watch.check_tensors()
        return self._assembly.step_part(paths, grads, grad_scale, last)

    def accumulate(self, grads: Any) -> int:
        """Add the gradients of a micro-batch to those of the next `step()`.

        Parameters
        ----------
        grads : nested arrays
            Gradients as `step` takes them. A leaf that is None every time takes no part in the
            step. With `zero_grads` they are set to zero.

        Returns
        -------
        int
            Number of micro-batches so far, by which `step(grad_scale=n)` divides.

        Raises
        ------
        TypeError, ValueError
            If a gradient does not fit. Nothing has changed then.

        Notes
        -----
        Sums are float32, and float64 for float64 parameters.
        """
        return self._assembly.accumulate(grads)

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
    def lr(self) -> float | dict[str, float]:
        """The learning rate of the next step; with several rules a dict by label.

        Set it, from the next step on, to a number or a schedule, or with several rules to a mapping
        with all labels of that dict. What is set is the new base value of "independent" weight
        decay. Errors are those of `replace`.
        """
        return self._assembly.rates.upcoming(self.step_count + 1)

    @lr.setter
    def lr(self, lr: RateChoice) -> None:
        if not self._assembly.set_rate(lr):
            self._adopt(with_rates(self._assembly.groups, lr), settled=False)

    @property
    def groups(self) -> dict[str, ParameterGroup]:
        """The parameter groups by label, as in `lr`: `opt.groups["*.w"].lr = 1e-4`."""
        assembly = self._assembly
        labels = enumerate(group.label for group in assembly.groups)
        return {label: ParameterGroup(self, assembly, k) for k, label in labels}

    def replace(self, label: str | None = None, /, **hyperparameters: Any) -> None:
        """Change hyperparameters from the next step on: `opt.replace(weight_decay=0.05)`.

        An optimizer that loads a `state_dict` or a file must have been given the same.

        Parameters
        ----------
        label : str, optional
            Label of the only parameter group to change, as in `lr`. By default each value goes to
            all rules that have the hyperparameter.
        **hyperparameters
            New values.

        Raises
        ------
        TypeError, ValueError
            If no rule has the hyperparameter, or a value does not fit the rule, the states or the
            parameters. Nothing has changed then.
        """
        self._adopt(with_hyperparameters(self._assembly.groups, label, hyperparameters))

    def _adopt(self, rules: Sequence[Rule], *, settled: bool = True) -> None:
        assembly = self._assembly
        if not assembly.change(rules):
            adopt = partial(assembly.adopt, rules)
            assembly.whole("hyperparameters", adopt, settled=settled, moved=True)

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

    def sync(self) -> None:
        """Take the masters anew from the parameters, after these were written by the caller.

        Without it the next step goes on from the masters, and what was written is lost.
        """
        self._assembly.whole("sync", self._assembly.sync)

    def synchronize(self) -> None:
        """Wait until a CUDA device has done all steps; on the host they are done already.

        Raises
        ------
        FloatingPointError
            If one of them found a norm that is NaN or infinite.
        """
        self._assembly.whole("synchronize", lambda: None)

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

    def lookahead(self) -> Exchange:
        """Move the parameters to p - mu v, where Nesterov's look-ahead form wants its gradient.

        Leaves of other rules stay where they are.

        Returns
        -------
        context manager
            On leaving it, by an exception too, the exact bits of the parameters are restored.

        Raises
        ------
        ValueError
            If no leaf has that form.
        RuntimeError
            On entering it inside of another such context.
        """
        return exchange.lookahead(self._assembly)

    def averaged(self) -> Averaged:
        """Return the averages of `ema`.

        Returns
        -------
        Averaged
            `averaged().params` has the averages, nested like the parameters. As a context,
            `with opt.averaged():`, it puts them in the place of the parameters, rounded to their
            dtypes; on leaving, by an exception too, the exact bits of the parameters are restored.

        Raises
        ------
        ValueError
            If there are no averages.
        RuntimeError
            On entering the context inside of another one.
        """
        if self._assembly.options.ema is None:
            raise ValueError("averaged(): there are no averages; make the optimizer with ema=0.999")
        self._assembly.check_owner()
        self._assembly.check_caught_up("averaged")
        return Averaged(self._assembly, self.params)

    def catch_up(self, rows: Mapping[str, np.ndarray] | None = None) -> None:
        """Replay the steps that rows missed because no gradient touched them.

        For `exact=True`. The rows have the bits then that steps with a gradient of zero would have
        given them, and cost what these steps cost.

        Parameters
        ----------
        rows : mapping of str to array of int, optional
            Indices of rows by path of the leaf: those that the forward pass will read and that the
            next gradient will have. By default all rows of all leaves, as before evaluation, saving
            or a change of hyperparameters.

        Raises
        ------
        RuntimeError
            If the optimizer was made without `exact=True`.
        TypeError, ValueError
            If a path or an index does not fit.
        """
        assembly = self._assembly
        if assembly.lazy_rows is None:
            raise RuntimeError("catch_up(): make the optimizer with exact=True")
        assembly.whole("catch_up", partial(assembly.catch_up, rows))

    def rebind(self, params: Any) -> None:
        """Take new arrays in place of the old ones, for trainers that write `W = W - ...`.

        Parameters
        ----------
        params : nested arrays
            Arrays with the nesting, shapes, dtypes and memory orders of the old ones. Masters are
            taken anew where values differ.

        Raises
        ------
        TypeError, ValueError
            If an array does not fit. Nothing has changed then.
        """

        def rebind() -> None:
            self._assembly.rebind(params)
            self.params = params

        self._assembly.whole("rebind", rebind, moved=True)

    def describe(self) -> str:
        """Describe what updates which leaf, and the memory that it takes.

        Returns
        -------
        str
            A table for people to read.
        """
        return summary.describe(self._assembly)

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
            self.synchronize()
        states = (leaf_state.saved for leaf_state in assembly.leaf_states)
        return summary.digest(assembly.paths, assembly.parameters, states, assembly.counters)

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

    def __deepcopy__(self, memo: dict[int, Any]) -> Optimizer:
        rebuild, arguments = self._recipe()
        made: Optimizer = rebuild(*copy.deepcopy(arguments, memo))
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
        return _rebuild, (self.params, self.rule, assembly.options, rules, self.state_dict())

    def __copy__(self) -> Optimizer:
        raise TypeError(
            "two optimizers would update the same arrays; copy.deepcopy makes one with its own"
        )


def _rebuild(
    params: Any, rule: Any, options: Options, rules: Sequence[Rule], state: dict[str, Any]
) -> Optimizer:
    optimizer = Optimizer(params, rule, **options._asdict())
    optimizer._adopt(rules)
    optimizer.load_state_dict(state)
    return optimizer
