"""The optimizer: many tensors, one rule or several, one step in place."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from .arrays.formats import RandomKey
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
        Arrays of float32, float64, bfloat16 (of ml_dtypes) or float16: dense in C or Fortran order,
        aligned, writable, none overlapping another. A float64 parameter is updated in float64
        arithmetic, any other in float32. On a CUDA device, arrays of CuPy, PyTorch or Numba.
    rule : Rule, mapping or callable
        One rule for all leaves; a mapping of path patterns to rules, of which the first that
        matches a leaf's dotted path (`block.0.w`) takes it; or a callable of path and array.
    clip_norm : float or mapping, optional
        Multiply gradients by min(1, clip_norm / norm), where norm is that of all (unscaled)
        gradients together. A mapping has a limit, or None, for each parameter group's label, and
        clips each group on its own. A norm that is NaN or infinite raises.
    clip_value : float, optional
        Keep every element of the (unscaled) gradients within +- this value instead.
    skip_nonfinite : bool
        Skip a step with a NaN or infinity in any gradient, and say so in its `StepInfo`.
    zero_grads : bool
        Set the gradients to zero in the pass that reads them.
    state_dtype : str or mapping, optional
        Format of the states, one for all or by state name: "float32", "float64", "bfloat16",
        "float16", or, from 4096 elements on, quantised in blocks: "float8" (e4m3; e5m3 for second
        moments), "dynamic8" (the map of bitsandbytes), "dynamic4" (torchao's). By default float64
        for float64 parameters and float32 for others.
    rounding : {"nearest", "stochastic", "kahan"}
        How parameters without masters, and states, are rounded to bfloat16 and float16.
        "stochastic" is unbiased, also in quantised states; "kahan" compensates bfloat16 parameters.
    master : {"float32", "split16"}, optional
        Separate float32 masters of bfloat16 and float16 parameters, or 16 more bits beside each
        bfloat16, which together are a float32.
    copy_out : nested arrays, optional
        Arrays like the parameters, of any supported dtype, or None, into which the same pass writes
        the new parameters.
    ema : float or schedule, optional
        Keep an average of each parameter (of its master, where there is one): average := average
        + (1 - ema) (parameter - average) in every step. See `averaged`.
    stats : bool
        Measure what `StepInfo.stats` tells, in the same passes.
    exact : bool
        Replay later the steps that rows missed which a gradient of `Rows` left out, as if their
        gradient had been zero. See `catch_up`.
    state_path : path, optional
        An empty or new directory for states larger than memory: a step has at most 32 MiB of them
        in memory at a time. The file there is no checkpoint and goes with the optimizer.
    seed : int
        Seed of stochastic rounding.
    backend : {"auto", "native", "numba", "reference", "cuda"}
        What runs the steps; "auto" takes "cuda" for arrays on a device.
    threads : int, optional
        Largest number of threads.
    verify : bool
        Run every step on copies first, compare with the float64 reference, and commit only what
        agrees.
    wait : bool
        False lets steps on a CUDA device not wait for the norm that `clip_norm` needs; see Notes.

    Raises
    ------
    TypeError, ValueError
        If a value is of the wrong kind, or does not fit.
    RuntimeError
        If the backend cannot be used.
    OSError
        If `state_path` is in use, holds anything else (FileExistsError), or has no room.

    Notes
    -----
    The bits of stochastic rounding depend on the seed, the leaf's path and step, the state and the
    element alone. An average such as v, rounded to the nearest bfloat16, moves only where a step
    changes it by half a unit: take "stochastic" there. A NaN or infinity in a quantised state makes
    its whole block NaN.

    With `wait=False`, `StepInfo.grad_norm` and `clip_scale` are arrays of the device without
    dimensions, whose `float()` waits. Where a norm is not finite the device takes neither that step
    nor a later one; the next step that knows, or whatever else waits, raises FloatingPointError,
    and counters are those before that step. It does not go with `skip_nonfinite`.

    An optimizer is for one thread at a time: RuntimeError tells the second one. With `state_path`
    it cannot be pickled, copied or used in a forked process.
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
        self.rule = rule
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
            Nested like the parameters and of their shapes, in any dtype that a parameter may have.
            A None leaf leaves its parameter, states and step count alone. Gradients may overlap
            each other (unless `zero_grads`) but no parameter or state; one in another memory layout
            than its parameter's is copied first. By default those that `accumulate` added up, which
            are consumed even where the step is skipped or finds no finite norm.
        grad_scale : float
            Divides the gradients before they are examined and clipped: the scale of the loss, or
            the number of micro-batches.
        hessian : nested arrays, optional
            Hessian estimates for Sophia, nested like the gradients.
        lr : float or mapping, optional
            Learning rate of this step alone, for all parameter groups or for each label.

        Returns
        -------
        StepInfo
            What the step did.

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

        All parts have the number, and so the learning rate, of one step, and each leaf its bits of
        a whole step; the part that is `last` ends it. A leaf without a part is left alone.

        Parameters
        ----------
        paths : sequence of str
            The leaves' dotted paths; none of them twice in a step.
        grads : sequence of arrays
            Their gradients, as `step` takes them.
        grad_scale : float, default 1.0
            As in `step`.
        last : bool, default False
            Whether this part ends the step. It may be empty.

        Returns
        -------
        StepInfo
            Its `step` is the number of the whole step.

        Raises
        ------
        ValueError
            If a path is unknown or comes twice, or if the optimizer was made with `clip_norm`,
            `skip_nonfinite` or `exact`, which need all gradients. Nothing has changed then.
        """
        self._assembly.watch.check_tensors()
        return self._assembly.step_part(paths, grads, grad_scale, last)

    def accumulate(self, grads: Any) -> int:
        """Add the gradients of a micro-batch to those that the next `step()` will take.

        Parameters
        ----------
        grads : nested arrays
            As `step` takes them. A leaf that is None every time takes no part in the step. With
            `zero_grads` they are set to zero.

        Returns
        -------
        int
            The number of micro-batches so far; divide by it with `step(grad_scale=n)`.

        Notes
        -----
        Sums are float32 (float64 for float64 parameters), and are allocated at the first call. A
        `state_dict` cannot be taken before the step.
        """
        return self._assembly.accumulate(grads)

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
        self._adopt(with_rates(self._assembly.groups, lr))

    @property
    def groups(self) -> dict[str, ParameterGroup]:
        """The parameter groups by label, as in `lr`: `opt.groups["*.w"].lr = 1e-4`."""
        assembly = self._assembly
        labels = enumerate(group.label for group in assembly.groups)
        return {label: ParameterGroup(self, assembly, k) for k, label in labels}

    def replace(self, label: str | None = None, /, **hyperparameters: Any) -> None:
        """Change hyperparameters from the next step on: `opt.replace(weight_decay=0.05)`.

        States and counters stay. Pickles and deep copies have the new values; what a `state_dict`
        or a file is loaded into must have been given the same.

        Parameters
        ----------
        label : str, optional
            Pattern (or name of a rule, as in `lr`) of the only parameter group that is meant; by
            default each hyperparameter goes to all rules that have it.
        **hyperparameters
            New values.

        Raises
        ------
        TypeError
            If no rule meant has such a name, or a value is of the wrong kind.
        ValueError
            If the label is unknown, a value is out of range, or the states (amsgrad) or parameters
            do not fit it. Nothing has changed then.
        RuntimeError
            Inside of `lookahead` and `averaged`.
        """
        self._adopt(with_hyperparameters(self._assembly.groups, label, hyperparameters))

    def _adopt(self, rules: Sequence[Rule]) -> None:
        def adopt() -> None:
            self._assembly.adopt(rules)
            if isinstance(self.rule, Rule):
                self.rule = rules[0]
            elif isinstance(self.rule, Mapping):
                self.rule = dict(zip(self.rule, rules, strict=True))

        self._assembly.whole("hyperparameters", adopt, settled=False)

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
        held = zip(self._assembly.paths, self._assembly.leaf_states, strict=True)
        return {path: leaf_state.visible for path, leaf_state in held}

    def leaf_state(self, path: str) -> tuple[LeafState, list[RandomKey]]:
        """Return all that a step writes of a leaf, and the keys of its random bits."""
        k = self._assembly.paths.index(path)
        return self._assembly.leaf_states[k], self._assembly.keys()[k]

    def sync(self) -> None:
        """Take the masters anew from the parameters, after these were written by the caller.

        Without it the next step goes on from the masters, and what was written is lost. Does
        nothing where there are no masters.
        """
        self._assembly.whole("sync", self._assembly.sync)

    def synchronize(self) -> None:
        """Wait until a CUDA device has done all steps; on the host they are done already.

        Raises
        ------
        FloatingPointError
            If one of them, with `wait=False`, found a norm that is NaN or infinite. Neither it nor
            a step after it has changed anything, counters included.
        """
        self._assembly.whole("synchronize", lambda: None)

    def flush(self) -> None:
        """Write the states in `state_path` to the disk, wait, and free all memory they take.

        The system does the same in its own time; this is for when memory is needed at once. Does
        nothing without `state_path`. Raises OSError where the disk failed.
        """
        if self._assembly.state_file:
            self._assembly.state_file.flush()

    def lookahead(self) -> Exchange:
        """Move the parameters to p - mu v, where Nesterov's look-ahead form wants its gradient.

        On leaving, by an exception too, their exact bits are restored. Leaves of other rules stay
        where they are. Raises ValueError where no leaf has that form, RuntimeError when nested.
        """
        return exchange.lookahead(self._assembly)

    def averaged(self) -> Averaged:
        """Return the averages of `ema`: `averaged().params` is nested like the parameters.

        `with opt.averaged():` puts them in the place of the parameters, rounded to their dtypes; on
        leaving, by an exception too, the parameters' exact bits are restored. Raises ValueError
        where there are no averages, RuntimeError on entering inside of another such context.
        """
        if self._assembly.options.ema is None:
            raise ValueError("averaged(): there are no averages; make the optimizer with ema=0.999")
        self._assembly.check_caught_up("averaged")
        return Averaged(self._assembly, self.params)

    def catch_up(self, rows: Mapping[str, np.ndarray] | None = None) -> None:
        """Replay the steps that rows missed because no gradient touched them.

        For `exact=True`: before the forward pass, with the rows that it will read and that the next
        gradient will have; without an argument all rows of all leaves, before evaluation, saving
        or a change of hyperparameters. After it they have the bits that steps with a gradient of
        zero would have given them. The cost is that of these steps.

        Parameters
        ----------
        rows : mapping, optional
            Path of a leaf -> indices, integers in any order. TypeError or ValueError otherwise.
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
            Nested as before, of the same shapes, dtypes and memory orders; TypeError or ValueError
            otherwise, and the optimizer keeps the old ones. Masters are taken anew where the values
            differ from the old arrays'.
        """

        def rebind() -> None:
            self._assembly.rebind(params)
            self.params = params

        self._assembly.whole("rebind", rebind, moved=True)

    def describe(self) -> str:
        """Return a table of what updates which leaf, and of the memory that it takes."""
        return summary.describe(self._assembly)

    def fingerprint(self) -> str:
        """Return a digest of parameters, states and counters: equal where all bits are.

        Any NaN counts as any other. The same on every machine, in hexadecimal digits.
        """
        assembly = self._assembly
        if not assembly.options.wait and not assembly.exchanged:
            self.synchronize()
        states = (leaf_state.saved for leaf_state in assembly.leaf_states)
        return summary.digest(assembly.paths, assembly.parameters, states, assembly.counters)

    def snapshot(self) -> Snapshot:
        """Return the live state that travels, for `fusedopt.interop`."""
        return self._assembly.snapshot

    def state_dict(self) -> dict[str, Any]:
        """Return counters and copies of the states; the parameters are the caller's to keep.

        {"format": 1, "step": ..., "seed": ..., "leaves": {path: {"rule", "hyperparameters", "t",
        "shape", "dtype", "order", "formats", "state"}}}. A quantised state m is there as "m.codes"
        and "m.scales". The hyperparameters are there to be compared, not to be taken over.
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
            What `state_dict` returned.
        strict : bool
            Whether hyperparameters must be equal too (of schedules what they print; any two other
            callables count as equal). With False this optimizer's own hold from here on, and only
            those that say what the states hold, such as `amsgrad` or `form`, must be equal.

        Raises
        ------
        ValueError
            With every difference in paths, rules, hyperparameters, shapes, dtypes, memory orders,
            formats and states. Nothing has changed then.
        """

        def restore() -> None:
            self._assembly.go_on(self._assembly.snapshot.restore(state, strict=strict))

        self._assembly.loaded("load_state_dict", restore)

    def save(
        self, path: str | os.PathLike[str], *, parameters: bool = True, metadata: Any = None
    ) -> None:
        """Write states, counters and parameters to one safetensors file: all that a run needs.

        A file at `path` is replaced at once when the new one is whole and on the disk: a process
        killed at any moment leaves the old file or the new one. No other copy is made in memory.

        Parameters
        ----------
        path : path
            The file. The parameter of the leaf `block.0.w` is called `p:block.0.w` there, its state
            m `m:block.0.w`; arrays in Fortran order lie there transposed. Every bit is kept.
        parameters : bool
            Whether to write the parameters and the arrays of `copy_out` too.
        metadata : optional
            Whatever else of the run must be of the same moment, such as the state of a random
            generator, in the types of JSON: `load` returns it.
        """

        def save() -> None:
            self._assembly.check_settled("save")
            self._assembly.snapshot.save(path, parameters, metadata)

        self._assembly.whole("save", save)

    def load(
        self, path: str | os.PathLike[str], *, parameters: bool = True, strict: bool = True
    ) -> Any:
        """Go on from a file of `save`, bit for bit: parameters and states are written in place.

        Returns the metadata that `save` was given, tuples as lists. The file is read into
        the arrays that there are. Accumulated gradients are forgotten.

        Parameters
        ----------
        path : path
            The file. OSError where it cannot be read; ValueError, and nothing has changed, where it
            is not whole or of another version, or lists every difference. Where the disk fails, or
            somebody shortens the file, while its arrays are read, the optimizer has part of them
            and refuses everything until it has loaded a whole file.
        parameters : bool
            With False the file's parameters are left there; the caller's must be in place.
        strict : bool
            As in `load_state_dict`.
        """

        def load() -> Any:
            snapshot = self._assembly.snapshot
            seed, metadata = snapshot.load(path, strict=strict, parameters=parameters)
            self._assembly.go_on(seed)
            return metadata

        return self._assembly.loaded("load", load)

    def __reduce__(self) -> tuple[Any, ...]:
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
