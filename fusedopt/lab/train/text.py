"""Text for a character-level model: what is read, how it is split, windows of it, a baseline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]

# A corpus must hold out at least one window, and a tenth of it is held out.
HELD_OUT = 10

FALLBACK_MODULES = (
    "argparse", "collections", "dataclasses", "inspect", "pickle", "statistics", "subprocess",
    "tarfile", "threading", "typing",
)  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """A text as integers.

    train, held_out: int32 indices into `alphabet` of the first nine tenths and of the rest;
    alphabet: the distinct characters in code-point order; source: where the text is from.
    """

    train: Ids
    held_out: Ids
    alphabet: str
    source: str

    @property
    def characters(self) -> int:
        """The length of the text."""
        return len(self.train) + len(self.held_out)

    def decode(self, ids: NDArray[Any]) -> str:
        """The characters of a vector of integers."""
        return "".join(self.alphabet[i] for i in ids)


def load(data: Path | None, context: int) -> Corpus:
    """Read `data`, or by default Python's own language reference.

    context: the length of the windows that will be cut; both parts hold at least one.
    Raises OSError if the file cannot be read, ValueError if it is not UTF-8 or is too short, or if
    no default text is on this machine.
    """
    source, text = default_text() if data is None else (str(data), _read(data))
    needed = HELD_OUT * (context + 1)
    if len(text) < needed:
        raise ValueError(
            f"{source}: expected at least {needed} characters ({HELD_OUT} windows of context + 1 ="
            f" {context + 1}, one of them held out), got {len(text)}; give a longer text"
        )
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    alphabet, inverse = np.unique(points, return_inverse=True)
    ids: Ids = inverse.astype(np.int32)
    border = len(ids) - len(ids) // HELD_OUT
    return Corpus(ids[:border], ids[border:], "".join(map(chr, alphabet)), source)


def default_text() -> tuple[str, str]:
    """Name and text of the English reference in `pydoc_data.topics`, each paragraph once.

    Its topics repeat whole sections of one another; without the repetitions nothing that is held
    out was seen in training. Where a distribution strips it, the source text of some modules of the
    standard library stands in. Raises ValueError if that is not there either.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        sources = [_source(name) for name in FALLBACK_MODULES]
        if not any(sources):
            raise ValueError(
                "default text: this Python ships neither pydoc_data.topics nor the source of its"
                " standard library; give a text with --data FILE"
            ) from None
        return "source text of Python's standard library (no pydoc_data here)", "\n".join(sources)
    paragraphs = (p for name in sorted(topics) for p in topics[name].split("\n\n"))
    unique = {p.strip(): p for p in paragraphs if p.strip()}
    return "Python's language reference (pydoc_data.topics)", "\n\n".join(unique.values())


def windows(ids: Ids, starts: NDArray[Any], context: int) -> tuple[Ids, Ids]:
    """Inputs x and targets y, each (len(starts), context): y is x one character later."""
    cut = ids[starts[:, None] + np.arange(context + 1)]
    return cut[:, :-1], cut[:, 1:]


def batches(
    ids: Ids, batch: int, context: int, rng: np.random.Generator, own: slice = slice(None)
) -> Iterator[tuple[Ids, Ids]]:
    """Endless pairs (x, y) of shape (batch, context) from random places; own: those wanted."""
    while True:
        yield windows(ids, rng.integers(len(ids) - context, size=batch)[own], context)


def spread(ids: Ids, count: int, context: int) -> tuple[Ids, Ids]:
    """Return at most `count` windows (x, y) that do not overlap, spread evenly over the text."""
    available = (len(ids) - 1) // context
    chosen = np.linspace(0, available - 1, min(count, available)).astype(np.int64)
    return windows(ids, chosen * context, context)


def bigram_loss(train: Ids, x: Ids, y: Ids, vocab: int) -> float:
    """Mean of -log P(y | x) in nats, P(b | a) = (count(ab) + 1) / (count(a) + vocab) in `train`.

    Counts are kept for the pairs that occur: a table of vocab**2 would not fit for large alphabets.
    """
    pairs, counts = np.unique(train[:-1].astype(np.int64) * vocab + train[1:], return_counts=True)
    before = np.bincount(train[:-1], minlength=vocab)
    wanted = x.astype(np.int64) * vocab + y
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    seen = np.where(pairs[place] == wanted, counts[place], 0)
    return float(np.mean(np.log(before[x] + vocab) - np.log(seen + 1)))


def _read(data: Path) -> str:
    raw = data.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{data}: expected UTF-8, got the byte {raw[error.start]:#04x} at offset {error.start};"
            f" convert it first, e.g. iconv -f LATIN1 -t UTF-8 {data} > utf8.txt"
        ) from None


def _source(module: str) -> str:
    spec = find_spec(module)
    get_source = getattr(spec.loader, "get_source", None) if spec else None
    return (get_source(module) or "") if get_source else ""
