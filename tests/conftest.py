"""Which tests a plain `pytest` runs: each, on as few cases as show all of its values."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

import fusedopt as fo


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run every test, the slow ones included")
    parser.addoption("--seterr", action="store_true", help='run under np.seterr(all="raise")')


def pytest_configure(config: pytest.Config) -> None:
    if config.option.all:
        config.option.markexpr = ""


@pytest.fixture(autouse=True)
def floating_point_errors(request: pytest.FixtureRequest) -> Iterator[None]:
    """With `--seterr` no floating-point error may leave the package, which rounds on purpose."""
    with np.errstate(all="raise" if request.config.option.seterr else None):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Skip, under `--seterr`, a test whose own arithmetic raises before the package is asked."""
    try:
        return (yield)
    except FloatingPointError as error:
        package, frame = str(Path(fo.__file__).parent), error.__traceback__
        while frame is not None and not frame.tb_frame.f_code.co_filename.startswith(package):
            frame = frame.tb_next
        if frame is None and item.config.option.seterr:
            pytest.skip("the test's own arithmetic")
        raise


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow the cases of each parametrised test that show no value of their own."""
    cases: dict[str, list[pytest.Function]] = defaultdict(list)
    for item in items:
        slow = item.get_closest_marker("slow") is not None
        if isinstance(item, pytest.Function) and hasattr(item, "callspec") and not slow:
            cases[item.nodeid.partition("[")[0]].append(item)
    for of_one_test in cases.values():
        for item in redundant(of_one_test):
            item.add_marker(pytest.mark.slow)


def redundant(cases: Iterable[pytest.Function]) -> Iterable[pytest.Function]:
    """Yield the cases whose values, one by one, are all shown by the cases that are left.

    The order is that of a checksum, so that each test shows other combinations, always the same.
    The variants of a rule count as one value, and each test shows a fifth of the rules: over all
    tests each rule is shown by many, and each variant by some.
    """
    shown: set[tuple[str, object]] = set()
    for number, item in enumerate(sorted(cases, key=lambda case: checksum(case.nodeid))):
        test = item.nodeid.partition("[")[0]
        values: set[tuple[str, object]] = set()
        for name, value in item.callspec.params.items():
            rule = rule_of(value)
            if rule is None:  # dictionaries are often made anew for each case
                values.add((name, repr(value) if isinstance(value, dict) else id(value)))
            elif checksum(test + rule) % 5 == 0:
                values.add((name, rule))
        if number and values <= shown:
            yield item
        shown |= values


def checksum(text: str) -> int:
    """A number that looks like any other, always the same."""
    return zlib.crc32(text.encode())


def rule_of(value: object) -> str | None:
    """The name of the rule that a value is, or names."""
    if isinstance(value, fo.Rule) or (isinstance(value, type) and issubclass(value, fo.Rule)):
        return value.name
    return value if isinstance(value, str) and value in fo.RULES else None
