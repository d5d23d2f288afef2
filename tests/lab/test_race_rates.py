"""The search for learning rates, and the file that keeps them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fusedopt.lab.race.rates import MOST, RateBook, best, next_rate


@pytest.mark.parametrize(
    ("tried", "expected"),
    [
        ({}, 0.3),
        ({0.3: 2.0}, 0.1),
        ({0.3: 2.0, 0.1: 2.1}, 0.9),
        ({0.3: 2.0, 0.1: 2.1, 0.9: 2.2}, None),  # the best is inside
        ({0.3: 2.0, 0.1: 1.9, 0.9: 2.2}, 0.033),
        ({0.3: 2.0, 0.1: 2.1, 0.9: 1.9}, 2.7),
        ({0.3: math.inf, 0.1: math.inf, 0.9: math.inf}, 0.033),  # down, where all explode
        ({0.3: 2.0, 0.1: 2.1, 0.9: 1.9, 2.7: 1.8}, 8.1),
        (
            {0.1: 2.1, 0.3: 2.0, 0.9: 1.9, **{float(k): 1.8 - k / 100 for k in range(2, 8)}},
            None,
        ),  # enough
    ],
)
def test_search_goes_on_while_the_best_is_at_an_edge(
    tried: dict[float, float], expected: float | None
) -> None:
    assert next_rate(0.3, tried) == expected


def test_search_finds_the_bottom_of_a_valley() -> None:
    tried: dict[float, float] = {}
    while (rate := next_rate(0.01, tried)) is not None:
        tried[rate] = abs(math.log(rate / 0.1))
    assert best(tried) == 0.09
    assert len(tried) <= MOST


def test_a_book_is_read_again_where_it_fits(tmp_path: Path) -> None:
    file, settings = tmp_path / "rates.json", {"steps": 4, "text": "ab"}
    book = RateBook(file, settings)
    book.add("sgd", 0.1, 2.5)
    book.add("sgd", 10.0, math.inf)
    assert RateBook.open(file, settings).tried == {"sgd": {0.1: 2.5, 10.0: math.inf}}
    assert RateBook.open(file, {**settings, "steps": 5}).tried == {}
    json.loads(file.read_text(encoding="ascii"), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"settings": {}}', '{"settings": {}, "tried": [1]}']
)
def test_a_file_that_is_no_book(content: str, tmp_path: Path) -> None:
    file = tmp_path / "rates.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"rates.json: expected learning rates .* with --search"):
        RateBook.open(file, {})
