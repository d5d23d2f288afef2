"""The optimizer: many tensors, one rule or several, one step in place."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from .arrays.storage import Master, Rounding, StateDtype
from .plan.options import ClipNorm, Options
from .plan.slow_weights import Lookahead
from .rules.groups import RateChoice, RuleChoice, rates_given, with_hyperparameters, with_rates
from .rules.hyperparameters import Schedule
from .step import exchange
from .step.accumulate import ACCUMULATED
from .step.assembly import Assembly
from .step.exchange import Averaged, Exchange
from .step.info import StepInfo
from .step.parameter_group import ParameterGroup
from .step.persistence import Persistent
from .step.rates import StepRate


class Optimizer(Persistent):
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
    clip_leaf : float, optional
        Multiply each array's gradient by min(1, clip_leaf / its own norm), unscaled.
    clip_adaptive : float, optional
        Keep the norm of each row of a gradient within this share of that of the parameter's row.
    centralize : bool
        Subtract from each row of a gradient its mean.
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
    slow_weights : Lookahead, optional
        Keep slow weights, to which the parameters return every k steps.
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
    A row is what one index of the first axis selects, of an array with one axis all of it; arrays
    with one axis are not centralised. Gradients are centralised first, and then clipped by
    `clip_adaptive`, `clip_leaf` and `clip_norm`, in this order; `grad_norm` tells of what reaches
    `clip_norm`. The first three are on the host and take no `Rows`.

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
        clip_leaf: float | None = None,
        clip_adaptive: float | None = None,
        centralize: bool = False,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
        state_dtype: StateDtype = None,
        rounding: Rounding = "nearest",
        master: Master | None = None,
        copy_out: Any = None,
        ema: float | Schedule | None = None,
        slow_weights: Lookahead | None = None,
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
            clip_norm, clip_value, clip_leaf, clip_adaptive, centralize, skip_nonfinite,
            zero_grads, state_dtype, rounding, master, copy_out, ema, slow_weights, stats, exact,
            seed, backend, threads, verify, wait,
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
    def lr(self) -> float | dict[str, float]:
        """The learning rate of the next step; with several rules a dict by label.

        Set it, from the next step on, to a number or a schedule, or with several rules to a mapping
        with all labels of that dict. What is set is the new base value of "independent" weight
        decay. Errors are those of `replace`.
        """
        return self._assembly.rates.upcoming(self.step_count + 1)

    @lr.setter
    def lr(self, lr: RateChoice) -> None:
        assembly = self._assembly
        if not assembly.renumber(rates_given(assembly.groups, lr)):
            assembly.take_rules(with_rates(assembly.groups, lr), settled=False)

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
        assembly = self._assembly
        given: list[Any] = [hyperparameters] * len(assembly.groups)
        if label is not None:
            given = [hyperparameters if g.label == label else {} for g in assembly.groups]
        if not assembly.renumber(given):
            assembly.take_rules(with_hyperparameters(assembly.groups, label, hyperparameters))

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

    def averaged(self) -> Exchange:
        """Return the averages of `ema`, or those that Schedule-Free rules make by themselves.

        Returns
        -------
        context manager
            `with opt.averaged():` puts the averages in the place of the parameters, rounded to
            their dtypes; on leaving, by an exception too, the exact bits of the parameters are
            restored. With `ema`, `averaged().params` has the averages, nested like the parameters.

        Raises
        ------
        ValueError
            If there are no averages.
        RuntimeError
            On entering the context inside of another one.
        """
        assembly = self._assembly
        with_ema = assembly.options.ema is not None
        context = Averaged if with_ema else exchange.evaluated
        averaged = context(assembly, self.params)
        if averaged is None:
            raise ValueError(
                "averaged(): there are no averages; make the optimizer with ema=0.999, or take"
                " ScheduleFreeAdamW"
            )
        assembly.check_owner()
        assembly.check_caught_up("averaged")
        return averaged

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
