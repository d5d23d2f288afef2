"""All that a training run starts from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import fusedopt as fo

from ...arrays.formats import FLOAT32
from ...arrays.trees import Tree
from . import gpt, text
from .options import DTYPES, TrainOptions
from .ranks import ALONE, Ranks
from .recipes import recipe

if TYPE_CHECKING:
    from ...mpi import ShardedOptimizer

HELD_OUT_WINDOWS = 256


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The beginning of a run, whose generators and parameters move with the run.

    params: as they are kept. held_out: the windows (x, y) for evaluation. places, labels, draws:
    generators of the places of batches, of curvature estimates and of the sample.
    """

    options: TrainOptions
    corpus: text.Corpus
    config: gpt.Config
    params: gpt.Params
    rules: dict[str, fo.Rule]
    optimizer: fo.Optimizer | ShardedOptimizer
    ranks: Ranks
    batches: Iterator[tuple[text.Ids, text.Ids]]
    held_out: tuple[text.Ids, text.Ids]
    bigram_loss: float
    places: np.random.Generator
    labels: np.random.Generator
    draws: np.random.Generator

    @classmethod
    def of(cls, options: TrainOptions, ranks: Ranks = ALONE) -> Setup:
        """Read the text and draw the parameters; equal options give equal bits.

        Raises OSError where the text cannot be read, ValueError where it or a size does not fit.
        """
        own = ranks.own(options.batch)
        corpus = text.load(options.data, options.context)
        config = gpt.Config(
            vocab=len(corpus.alphabet),
            context=options.context,
            layers=options.layers,
            heads=options.heads,
            width=options.width,
            tied=options.tied,
        )
        seeds = np.random.SeedSequence(options.seed).spawn(4)
        weights, places, labels, draws = map(np.random.default_rng, seeds)
        params = cast(gpt.init(weights, config), DTYPES[options.dtype])
        rules = recipe(
            options.rule,
            options.lr,
            options.steps,
            options.tokens,
            options.schedule,
            options.curvature,
        )
        x, y = text.spread(corpus.held_out, HELD_OUT_WINDOWS, options.context)
        return cls(
            options=options,
            corpus=corpus,
            config=config,
            params=params,
            rules=rules,
            optimizer=_optimizer(ranks, params, rules, options),
            ranks=ranks,
            batches=text.batches(corpus.train, options.batch, options.context, places, own),
            held_out=(x, y),
            bigram_loss=text.bigram_loss(corpus.train, x, y, config.vocab),
            places=places,
            labels=labels,
            draws=draws,
        )

    def evaluated(self) -> AbstractContextManager[Any]:
        """Return a context in which the parameters are those that the rules want evaluated."""
        averages = any(rule.evaluated for rule in self.rules.values())
        return self.optimizer.averaged() if averages else nullcontext()

    def weights(self) -> gpt.Params:
        """The parameters as the model computes with them, in float32."""
        return cast(self.params, FLOAT32)

    @property
    def parameters(self) -> int:
        """The number of trained elements."""
        return sum(leaf.value.size for leaf in Tree(self.params).leaves)


def _optimizer(
    ranks: Ranks, params: gpt.Params, rules: dict[str, fo.Rule], options: TrainOptions
) -> fo.Optimizer | ShardedOptimizer:
    if ranks.comm is None:
        return fo.Optimizer(params, rules, **options.optimizer)
    from ...mpi import ShardedOptimizer

    return ShardedOptimizer(params, rules, ranks.comm, **options.optimizer)


def cast(tree: gpt.Params, dtype: np.dtype) -> gpt.Params:
    """The tree with its arrays in a dtype; they themselves where they have it."""
    shape = Tree(tree)
    cast: gpt.Params = shape.build([leaf.value.astype(dtype, copy=False) for leaf in shape.leaves])
    return cast
